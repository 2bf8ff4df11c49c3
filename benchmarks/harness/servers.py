"""Services as processes of their own, as a person would start them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf.supervisor.group import child_environment, free_port
from rlhf.supervisor.health import is_serving
from rlhf.supervisor.process import Process, always, last_line, stop

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Served:
    address: str
    pid: int


@contextmanager
def policy_service(
    model: Path, log: Path, *, threads: int, settings: Mapping[str, object] | None = None
) -> Iterator[Served]:
    """`rlhf policy` on a free port, ready."""
    port = free_port(HOST)
    own = {"policy.model": model, "policy.port": port, "policy.threads": threads, **(settings or {})}
    own["policy.advertise"] = f"{HOST}:{port}"
    process = _process("policy", own, log, threads, f"{HOST}:{port}")
    with _running(process) as pid:
        yield Served(f"{HOST}:{port}", pid)


@contextmanager
def rollout_worker(settings: Mapping[str, object], log: Path) -> Iterator[int]:
    """`rlhf rollouts`; its process id."""
    with _running(_process("rollouts", settings, log, 1)) as pid:
        yield pid


def _process(verb: str, settings: Mapping[str, object], log: Path, threads: int, address: str = "") -> Process:
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = {**child_environment(os.environ), "OMP_NUM_THREADS": str(threads)}
    ready = partial(is_serving, address, "rlhf.v1.PolicyService", tls_ca=None) if address else always
    command = [sys.executable, "-m", "rlhf.cli.main", verb, *options]
    return Process(verb, command, log, environment=environment, ready=ready, address=address)


@contextmanager
def _running(process: Process) -> Iterator[int]:
    process.start()
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not process.ready():
            if process.exit_status() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{process.name} did not start: {last_line(process.log)}")
            time.sleep(0.05)
        pid = process.pid()
        assert pid is not None
        yield pid
        if process.exit_status() is not None:
            raise RuntimeError(f"{process.name} ended by itself: {last_line(process.log)}")
    finally:
        stop([process], STOP_TIMEOUT_S, lambda: False)
