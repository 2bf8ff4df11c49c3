"""One child process: in a session of its own, with a log, gone when the supervisor is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

LAUNCHER = Path(__file__).with_name("launch.py")
LAST_LINE_BYTES = 4096


class Child(Protocol):
    """What the supervisor keeps alive: a process, or the embedded Redis."""

    name: str
    log: Path
    address: str
    """Where it answers, for people; empty: it is no server."""

    def start(self) -> None:
        """Also after it has died, any number of times."""

    def pid(self) -> int | None: ...

    def exit_status(self) -> int | None:
        """None: it runs. Negative: the signal that ended it."""

    def ready(self) -> bool: ...

    def terminate(self) -> None:
        """Asks it to end. Returns at once."""

    def kill(self) -> None:
        """Ends it, and whatever it started."""


def always() -> bool:
    return True


class Process:
    """A command that writes to its log, or to this process's terminal if `terminal` is set."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        ready: Callable[[], bool] = always,
        terminal: bool = False,
        address: str = "",
    ) -> None:
        """
        Args:
            environment: all of the child's environment; None: this process's.
            ready: whether it can do its work; asked after the start, must answer within a second.
            terminal: it shares stdout and stderr with this process, and writes `log` itself.
        """
        self.name, self.log, self.address, self.ready = name, log, address, ready
        self._command, self._environment, self._terminal = list(command), environment, terminal
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = dying_with_parent(self._command, signal.SIGKILL)
        with self.log.open("ab") as log:
            output = None if self._terminal else log
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )

    def pid(self) -> int | None:
        return None if self._popen is None else self._popen.pid

    def exit_status(self) -> int | None:
        """As of now; the first call after the end also ends what the process left behind in its session."""
        popen = self._started()
        if popen.returncode is None and popen.poll() is not None:
            # At once: whoever is left in the group keeps its number, and a group that is empty has just freed its own.
            _signal_group(popen.pid, signal.SIGKILL)
        return popen.returncode

    def terminate(self) -> None:
        if self.exit_status() is None:
            _signal_group(self._started().pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.exit_status() is None:
            _signal_group(self._started().pid, signal.SIGKILL)
            self._started().wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._popen


def dying_with_parent(command: Sequence[str], at_death: signal.Signals) -> list[str]:
    """`command`, started such that it gets the signal when this process is gone. Start it from the main thread: the
    kernel counts a thread's end as the parent's."""
    return [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(int(at_death)), *command]


def last_line(log: Path) -> str:
    """The newest line with anything on it; empty: there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_LINE_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def ended_how(status: int) -> str:
    """`exit code 3`, or `killed by SIGKILL`."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def stop(children: Sequence[Child], timeout_s: float, hurry: Callable[[], bool]) -> None:
    """Asks all to end, and ends those that have not after `timeout_s`, or as soon as `hurry` says so."""
    deadline_s = time.monotonic() + timeout_s
    for child in children:
        child.terminate()
    while any(child.exit_status() is None for child in children):
        if time.monotonic() > deadline_s or hurry():
            break
        time.sleep(0.02)
    for child in children:
        child.kill()


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # already gone
    except PermissionError:
        return  # macOS answers so for a group of which only a zombie is left
