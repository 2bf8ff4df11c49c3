"""Services as processes of their own, as a person would start them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf.supervisor.group import SERVICES, child_environment, free_port
from rlhf.supervisor.health import is_serving
from rlhf.supervisor.process import Process, always, last_line, stop

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 10.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Served:
    address: str
    pid: int


@contextmanager
def service(verb: str, settings: Mapping[str, object], log: Path, *, threads: int) -> Iterator[Served]:
    """`rlhf policy`, `reward` or `reference` on a free port, ready."""
    port = free_port(HOST)
    address = f"{HOST}:{port}"
    own = {f"{verb}.port": port, f"{verb}.threads": threads, **settings}
    with _running(_process(verb, own, log, threads, partial(is_serving, address, SERVICES[verb], tls_ca=None))) as pid:
        yield Served(address, pid)


def policy_service(
    model: Path, log: Path, *, threads: int, settings: Mapping[str, object] | None = None
) -> AbstractContextManager[Served]:
    return service("policy", {"policy.model": model, **(settings or {})}, log, threads=threads)


@contextmanager
def rollout_worker(settings: Mapping[str, object], log: Path) -> Iterator[int]:
    """`rlhf rollouts`; its process id."""
    with _running(_process("rollouts", settings, log, 1, always)) as pid:
        yield pid


def _process(verb: str, settings: Mapping[str, object], log: Path, threads: int, ready: Callable[[], bool]) -> Process:
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = {**child_environment(os.environ), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "rlhf.cli.main", verb, *options]
    return Process(verb, command, log, environment=environment, ready=ready)


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
