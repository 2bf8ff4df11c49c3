"""A deployment of docker/compose.yaml of its own: other project, ports, images and volumes than anybody's.

Deadlines are those of a machine that is busy with something else.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf.settings.loader import setting_names, variable

ROOT = Path(__file__).parent.parent.parent
SETTINGS = "/etc/rlhf/settings.toml"
MAIN_PROCESS = {"policy": "rlhf policy", "rollouts": "rlhf rollouts", "ppo": "rlhf ppo", "redis": "redis-server"}
"""What the command line of each service's main process holds."""


def engine_trouble() -> str:
    """Why there is no engine to test with; empty: there is one."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no Docker engine answers ({error})"
        if done.returncode != 0:
            return f"no Docker engine answers (`{' '.join(command)}`: {done.stderr.strip().splitlines()[-1]})"
    return ""


class Deployment:
    """One run in containers. Every call has a deadline."""

    def __init__(self, settings: Path, run: str) -> None:
        self.project = f"rlhf-test-{uuid.uuid4().hex[:8]}"
        self.folder = f"/var/lib/rlhf/runs/{run}"
        self.image = "rlhf-services/rollouts:test"
        self._began_s = time.monotonic()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in _of_settings()},
            "RLHF_SETTINGS_FILE": str(settings),
            "RLHF_TAG": "test",
            **{f"RLHF_{name}": "0" for name in ("POLICY_PORTS", "REWARD_PORT", "REFERENCE_PORT")},
        }

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_s:6.1f} s  {text}", flush=True)

    def compose(self, *arguments: str, timeout_s: float = 60) -> str:
        return self._run("docker", "compose", "-p", self.project, "-f", "docker/compose.yaml", *arguments, s=timeout_s)

    def docker(self, *arguments: str, timeout_s: float = 60) -> str:
        return self._run("docker", *arguments, s=timeout_s)

    def rlhf(self, service: str, verb: str, timeout_s: float = 60) -> str:
        """A command of ours, in a container that runs."""
        return self.compose("exec", "-T", service, "rlhf", verb, "--config", SETTINGS, timeout_s=timeout_s)

    def up(self, *options: str, timeout_s: float = 900) -> None:
        self.compose("--progress", "quiet", "up", "--wait", *options, timeout_s=timeout_s)

    def containers(self, service: str) -> list[str]:
        """Names of those that exist, in the order of their numbers."""
        lines = self.compose("ps", "--all", "--format", "{{.Name}}", service).split()
        return sorted(lines, key=lambda name: int(name.rpartition("-")[2]))

    def inspect(self, container: str, field: str) -> str:
        return self.docker("inspect", "--format", f"{{{{{field}}}}}", container).strip()

    def restarts(self, container: str) -> int:
        return int(self.inspect(container, ".RestartCount"))

    def healthy(self, container: str) -> bool:
        return self.inspect(container, ".State.Health.Status") == "healthy"

    def steps(self) -> int:
        """Optimisation steps made so far, from the trainer's records."""
        shell = f"tail -n 1 {self.folder}/metrics.jsonl 2>/dev/null || true"
        # Not through compose, whose start costs more than everything else here.
        rows = self.docker("exec", f"{self.project}-reward-1", "sh", "-c", shell).splitlines()
        return int(json.loads(rows[-1])["step"]) if rows else 0

    def published(self, container: str, port: int) -> str:
        """Where the host reaches a container's port."""
        return self.docker("port", container, f"{port}/tcp").split()[0]

    def token(self) -> str:
        return self.compose("exec", "-T", "reward", "cat", "/run/rlhf/token").strip()

    def kill(self, container: str, service: str) -> None:
        """SIGKILL to the main process by its number on the host, behind the engine's back: a stop that the engine makes
        itself counts as wanted, and no restart policy acts."""
        pid = self._main_pid(container, MAIN_PROCESS[service])
        host = ["--pid", "host", "--network", "none", "--user", "10001:10001", "--entrypoint", "sh"]
        self.docker("run", "--rm", *host, self.image, "-c", f"kill -KILL {pid}")

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float) -> float:
        """Seconds that it took."""
        began_s = time.monotonic()
        while not condition():
            waited_s = time.monotonic() - began_s
            assert waited_s < timeout_s, f"{what}: not after {timeout_s:.0f} s"
            time.sleep(1)
        return time.monotonic() - began_s

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A failure inside comes with what the containers last said."""
        try:
            yield
        except BaseException:
            print(self.compose("ps", "--all"), self.compose("logs", "--no-color", "--tail", "25"), flush=True)
            raise

    def remove(self) -> None:
        """With its volumes. Images stay, for the next time."""
        self.compose("--progress", "quiet", "down", "--volumes", "--remove-orphans", "--timeout", "5", timeout_s=120)

    def _main_pid(self, container: str, pattern: str) -> int:
        rows = [row.split(maxsplit=1) for row in self.docker("top", container, "-eo", "pid,args").splitlines()[1:]]
        found = [int(pid) for pid, args in rows if pattern in args and "init" not in args.split()[0]]
        assert len(found) == 1, f"{container}: {rows}"
        return found[0]

    def _run(self, *command: str, s: float) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=s)
        assert done.returncode == 0, f"{_shown(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout


def _of_settings() -> set[str]:
    return {variable(name) for name in setting_names()} | {"COMPOSE_FILE", "COMPOSE_PROJECT_NAME", "COMPOSE_PROFILES"}


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)
