"""The doctor against real gRPC servers that say what a test makes them say, and a real Redis."""

import hashlib
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from rlhf.doctor import checks
from rlhf.doctor.checks import run
from rlhf.doctor.findings import Finding
from rlhf.errors import MachineError
from rlhf.models.causal import weights_sha256
from rlhf.queues.connection import open_client
from rlhf.queues.registry import open_registry
from rlhf.queues.settings import RedisSettings
from rlhf.settings.loader import load_settings
from rlhf.settings.run import Settings
from rlhf.supervisor.group import SERVICES
from rlhf.v1 import policy_pb2, policy_pb2_grpc, reference_pb2, reference_pb2_grpc, reward_pb2, reward_pb2_grpc
from rlhf.wire.messages import to_version
from rlhf.wire.records import WeightVersion
from support.tiny import tiny_lm_folder

ADD: dict[str, Any] = {
    "policy": (policy_pb2_grpc.PolicyServiceServicer, policy_pb2_grpc.add_PolicyServiceServicer_to_server),
    "reward": (reward_pb2_grpc.RewardServiceServicer, reward_pb2_grpc.add_RewardServiceServicer_to_server),
    "reference": (
        *(reference_pb2_grpc.ReferenceServiceServicer, reference_pb2_grpc.add_ReferenceServiceServicer_to_server),
    ),
}
Serve = Callable[[str, Any], str]


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers here answer Info alone; test_doctor_models.py tries what is behind it."""
    for name in ("check_logprobs", "check_reward"):
        monkeypatch.setattr(f"rlhf.doctor.services.{name}", lambda *_: iter(()))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a service whose Info answers what it is given, and tells its address."""
    servers = []

    def start(section: str, info: Any) -> str:
        base, add = ADD[section]
        server = grpc.server(futures.ThreadPoolExecutor(2))
        port = server.add_insecure_port("127.0.0.1:0")
        add(type("Says", (base,), {"Info": lambda self, request, context: info})(), server)
        status = health.HealthServicer()
        status.set(SERVICES[section], health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait(5)


def settings_of(folder: Path, *overrides: str) -> Settings:
    return load_settings(overrides=[f"run.folder={folder}", "redis.connect_timeout_s=1", *overrides])


def problems(settings: Settings, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(MachineError, match=r"^\d+ problems?; the first: "):
        run(settings)
    return [line.removeprefix("problem  ") for line in capsys.readouterr().out.splitlines() if line[:7] == "problem"]


def test_a_machine_on_which_nothing_runs_yet_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(settings_of(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert {line.split()[1] for line in lines} == {"packages", "redis", "disk", "service"}


def test_redis_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = problems(settings_of(tmp_path, "redis.url=redis://127.0.0.1:1"), capsys)
    assert line.startswith("redis      Redis at redis://127.0.0.1:1 has not answered for ")


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        (line,) = problems(settings_of(tmp_path, f"reward.port={port}"), capsys)
    assert line == f"port       reward: 127.0.0.1:{port} is in use; stop who listens there, or set reward.port"


def test_a_full_disk_and_a_wrong_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "MIN_FREE_GIB", 1e9)
    found = ["numpy>=99", "never-there>1", "pytest<1; extra == 'dev'", "redis; python_version < '3'"]
    monkeypatch.setattr(checks.metadata, "requires", lambda name: found)
    packages, disk = problems(settings_of(tmp_path), capsys)
    assert packages.startswith("packages   numpy ")
    assert packages.endswith(" is not >=99, never-there is not installed; run `make setup`")
    assert " GiB are free under " in disk
    assert disk.endswith("or set run.folder")


def test_a_service_that_was_named_and_is_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = problems(settings_of(tmp_path, "rollouts.policy=127.0.0.1:1"), capsys)
    assert line == "service    policy at 127.0.0.1:1 is not ready; see its log, or rlhf policy"


def test_tokenizers_that_differ(tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_lm_folder(tmp_path / "model")
    policy = serve("policy", policy_pb2.PolicyInfoResponse(tokenizer_sha256="a" * 64))
    model = weights_sha256(folder)
    reference = serve("reference", reference_pb2.ReferenceInfoResponse(tokenizer_sha256="b" * 64, model_sha256=model))
    overrides = [f"rollouts.policy={policy}", f"rollouts.reference={reference}", f"reference.model={folder}"]
    (line,) = problems(settings_of(tmp_path, *overrides), capsys)
    assert line.startswith("tokenizer  policy aaaaaaaa, reference bbbbbbbb; ")


def test_a_reward_model_may_have_another_tokenizer(
    tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = serve("policy", policy_pb2.PolicyInfoResponse(tokenizer_sha256="a" * 64))
    reward = serve("reward", reward_pb2.RewardInfoResponse(tokenizer_sha256="c" * 64))
    run(settings_of(tmp_path, f"rollouts.policy={policy}", f"rollouts.reward={reward}"))
    assert "ok       tokenizer  the reward model's is another, cccccccc: it scores texts" in capsys.readouterr().out


def test_a_reference_of_another_model(tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_lm_folder(tmp_path / "model")
    reference = serve("reference", reference_pb2.ReferenceInfoResponse(model_sha256="d" * 64))
    settings = settings_of(tmp_path, f"rollouts.reference={reference}", f"reference.model={folder}")
    (line,) = problems(settings, capsys)
    assert line == (
        f"reference  serves dddddddd, and {folder} is {weights_sha256(folder)[:8]}; start the reference service again"
    )


def test_weights_that_are_not_the_current_ones(
    tmp_path: Path,
    serve: Serve,
    embedded_redis: str,
    redis_settings: RedisSettings,
    run_name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "0-1"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    old, current = WeightVersion("r", 0, 0, "e" * 64), WeightVersion("r", 0, 1, sha256)
    registry = open_registry(open_client(embedded_redis, redis_settings), run_name, redis_settings)
    assert registry.advance(current, weights.as_uri(), None)

    def settings_with(held: WeightVersion) -> Settings:
        policy = serve("policy", policy_pb2.PolicyInfoResponse(tokenizer_sha256="a", current=to_version(held)))
        return settings_of(tmp_path, f"rollouts.policy={policy}", f"redis.url={embedded_redis}", f"run.name={run_name}")

    run(settings_with(current))
    assert f"ok       weights    policy holds {current}" in capsys.readouterr().out
    (line,) = problems(settings_with(old), capsys)
    assert line == f"weights    policy holds {old}; current is {current}; see policy's log"

    (weights / "model.safetensors").write_bytes(b"weighty")
    (line,) = problems(settings_with(current), capsys)
    assert line.endswith("; restart the trainer: it publishes its weights again")


def test_a_finding_prints_as_one_line() -> None:
    assert str(Finding("disk", True, "much", "make room")) == "ok       disk       much"
    assert str(Finding("disk", False, "none", "make room")) == "problem  disk       none; make room"
