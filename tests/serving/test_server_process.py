"""`rlhf reward` as a process: how it starts, drains and fails."""

from __future__ import annotations

import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from rlhf.serving import client as client_module
from rlhf.serving.client import call_sync, connect_sync
from rlhf.v1 import reward_pb2, reward_pb2_grpc
from rlhf.wire.tensors import from_tensor

START_TIMEOUT_S = 60.0
RULE = "import time\n\ndef slow(items):\n    time.sleep(1)\n    return [1.0] * len(items)\n"


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "rlhf.cli.main", "reward", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with running:
        try:
            yield running
        finally:
            running.kill()


def first_line(running: subprocess.Popen[str]) -> str:
    lines: queue.Queue[str] = queue.Queue()
    assert running.stdout is not None
    threading.Thread(target=lambda: lines.put(running.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
    return lines.get(timeout=START_TIMEOUT_S)


@pytest.fixture
def rule(tmp_path: Path) -> str:
    path = tmp_path / "slow_rule.py"
    path.write_text(RULE)
    return f"{path}:slow"


def score(address: str, answers: list[float]) -> None:
    with connect_sync(address) as channel:
        answers.extend(score_on(channel))


def score_on(channel: grpc.Channel) -> list[float]:
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    items = [reward_pb2.TextItem(prompt="a", completion="b")]
    request = reward_pb2.ScoreRequest(texts=reward_pb2.TextBatch(items=items))
    response = call_sync(stub.Score, request, timeout_s=20)
    found: list[float] = from_tensor(response.scores, "scores").tolist()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_calls_in_flight_finish_and_exits_0(rule: str, number: signal.Signals) -> None:
    with process("--rule", rule) as running:
        found = re.fullmatch(r"reward listening on (127\.0\.0\.1:\d+)\n", first_line(running))
        assert found
        answers: list[float] = []
        call = threading.Thread(target=score, args=(found[1], answers))
        call.start()
        call.join(0.5)
        running.send_signal(number)
        call.join(20)
        assert answers == [1.0]
        assert running.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (("--model", "no/such/folder"), 2, "no/such/folder"),
        (("--rule", "no_such_module_here:rule"), 2, "no module no_such_module_here can be imported"),
        (("--rule", "json:loads", "--host", "0.0.0.0"), 2, "can be reached from other machines"),
    ],
)
def test_a_start_that_fails_is_one_sentence(arguments: tuple[str, ...], exit_code: int, says: str) -> None:
    with process(*arguments) as running:
        out, error = running.communicate(timeout=START_TIMEOUT_S)
    assert running.returncode == exit_code
    assert says in error.splitlines()[-1]
    assert "Traceback" not in error
    assert out == ""


def test_a_port_in_use_is_one_sentence(rule: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with process("--rule", rule, "--port", str(port)) as running:
            _, error = running.communicate(timeout=START_TIMEOUT_S)
    assert running.returncode == 3
    assert f"port {port} on 127.0.0.1 is in use" in error.splitlines()[-1]


def test_calls_to_a_frozen_replica_move_on_to_another_one(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections stay open, and the kernel goes on taking what is sent."""
    monkeypatch.setattr(client_module, "SILENCE_MS", 1000)
    with process("--rule", rule) as frozen, process("--rule", rule) as awake:
        addresses = ",".join(first_line(each).split()[-1] for each in (frozen, awake))
        with connect_sync(addresses, service="rlhf.v1.RewardService") as channel:
            for _ in range(4):
                score_on(channel)
            frozen.send_signal(signal.SIGSTOP)
            began_s = time.monotonic()
            answers = [answer for _ in range(4) for answer in score_on(channel)]
    assert answers == [1.0] * 4
    assert time.monotonic() - began_s < 15, "gRPC's own patience is more than a minute"
