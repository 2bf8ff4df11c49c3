"""The processes of step 3 on one machine: what each is called, how it is started, where it listens."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rlhf.errors import StageFailed
from rlhf.queues.connection import EMBEDDED
from rlhf.settings import Listen
from rlhf.settings.loader import setting_names, variable
from rlhf.settings.run import Settings
from rlhf.supervisor.embedded_redis import EmbeddedRedis
from rlhf.supervisor.health import is_serving
from rlhf.supervisor.lock import is_held
from rlhf.supervisor.process import Child, Process

SERVICES = {
    "policy": "rlhf.v1.PolicyService",
    "reward": "rlhf.v1.RewardService",
    "reference": "rlhf.v1.ReferenceService",
}
"""Section (and verb) of each service, and the name that its health goes by."""
START_PATIENCE_S = 2.0


class RedisChild:
    """The embedded Redis as a child of the supervisor."""

    name = "redis"
    address = ""

    def __init__(self, folder: Path, log: Path) -> None:
        self.log = log
        self._redis = EmbeddedRedis(folder, log_path=log)

    def start(self) -> None:
        """Most runs' data are loaded when it returns; of the others `ready` tells, so that signals are not kept
        waiting."""
        self._redis.launch(START_PATIENCE_S)
        self.address = self._redis.url

    def pid(self) -> int | None:
        return self._redis.pid

    def exit_status(self) -> int | None:
        return None if self._redis.alive() else 1

    def ready(self) -> bool:
        return self._redis.loaded()

    def terminate(self) -> None:
        pid = self.pid()
        if pid is not None and self._redis.alive():
            os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        self._redis.stop(timeout_s=1.0)


@contextmanager
def redis_at_hand(settings: Settings) -> Iterator[None]:
    """While the block lasts, the run's Redis answers, even if nobody supervises the run and its Redis is embedded.

    Raises:
        StageFailed: the run has not come to step 3, so there are no data.
    """
    paths = settings.paths
    if settings.redis.url != EMBEDDED or is_held(paths.lock):
        yield
        return
    if not paths.redis.exists():
        raise StageFailed(f"{paths.redis} does not exist: run {settings.run.name} has not come to step 3")
    redis = EmbeddedRedis(paths.redis, log_path=paths.logs / "redis.log")
    redis.start()
    try:
        yield
    finally:
        redis.stop()


def stage_process(verb: str, settings: Settings) -> Process:
    """A stage as a process of its own, on this terminal."""
    return _process(verb, verb, settings, (), terminal=True)


def group(settings: Settings, *, trainer: bool = True) -> list[Child]:
    """Everything that `rlhf ppo` needs, rounds of feedback if there are to be some, and the trainer itself at the end.

    Args:
        trainer: False: without it, because it is done and rounds are not.
    """
    policies = [_service("policy", settings, number) for number in range(settings.run.policies)]
    reward, reference = _service("reward", settings), _service("reference", settings)
    children: list[Child] = [*policies, reward, reference]
    if settings.redis.url == EMBEDDED:
        children.insert(0, RedisChild(settings.paths.redis, settings.paths.logs / "redis.log"))
    addresses = {
        "rollouts.policy": ",".join(policy.address for policy in policies),
        "rollouts.reward": reward.address,
        "rollouts.reference": reference.address,
    }
    for number in range(settings.run.workers):
        consumer = f"worker-{number}"
        children.append(_process(consumer, "rollouts", settings, _set({**addresses, "rollouts.consumer": consumer})))
    if settings.feedback.rounds:
        children += _feedback(settings, addresses)
    if trainer:
        own = _set({"ppo.reference": reference.address})
        children.append(_process("ppo", "ppo", settings, own, terminal=True))
    return children


def _feedback(settings: Settings, addresses: Mapping[str, object]) -> list[Child]:
    """The rounds, and the page where people judge. Both speak on this terminal, to whoever has to do something."""
    rounds = _process("rounds", "rounds", settings, _set(addresses), terminal=True)
    if not settings.feedback.people:
        return [rounds]
    return [_process("annotate", "annotate", settings, _set({"annotate.samples": "false"}), terminal=True), rounds]


def _service(section: str, settings: Settings, number: int = 0) -> Process:
    listen: Listen = getattr(settings, section)
    port = listen.port + number if listen.port else free_port(listen.host)
    address = f"{reachable(listen.host)}:{port}"
    own: dict[str, object] = {f"{section}.port": port}
    name = section
    if section == "policy":
        name = f"policy-{number}"
        advertise = settings.policy.advertise or address
        own |= {"policy.name": name, "policy.join_run": "true", "policy.advertise": advertise}
    ready = partial(
        is_serving, address, SERVICES[section], tls_ca=settings.rollouts.tls_ca if listen.tls_cert else None
    )
    if section == "reward" and settings.feedback.rounds:
        own["reward.follow"] = settings.paths.reward_in_service.absolute()
    process = _process(name, section, settings, _set(own))
    process.ready, process.address = ready, address
    return process


def _process(name: str, verb: str, settings: Settings, options: tuple[str, ...], *, terminal: bool = False) -> Process:
    command = [sys.executable, "-m", "rlhf.cli.main", verb, "--config", str(settings.paths.settings), *options]
    log = settings.paths.logs / f"{name}.log"
    return Process(name, command, log, environment=child_environment(os.environ), terminal=terminal)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables of settings: they are in the settings file already, and would win over it."""
    ours = {variable(name) for name in setting_names()}
    kept = {name: value for name, value in environment.items() if name not in ours}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def free_port(host: str) -> int:
    """One that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """Where this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, host)


def _set(values: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(part for name, value in values.items() for part in ("--set", f"{name}={value}"))
