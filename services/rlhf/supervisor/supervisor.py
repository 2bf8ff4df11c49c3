"""Keeps a group of processes alive until the one that matters is done.

waiting ──(pause over)──▶ starting ──(ready)──▶ ready
   ▲                         │                    │
   └──────(died, or not ready within start_timeout_s)      too many deaths, or a refusal: give up
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf.errors import InputError, MachineError, StageFailed, StorageError, TransientError
from rlhf.supervisor.process import Child, ended_how, last_line, stop
from rlhf.supervisor.settings import RunSettings
from rlhf.supervisor.signals import Signals

LOOK_EVERY_S = 0.1
PROBE_EVERY_S = 0.3
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
HOPELESS = {
    InputError.exit_code: "",
    StageFailed.exit_code: "",
    StorageError.exit_code: ": the disk is full, or a folder cannot be written",
}
"""Exit codes after which the same start cannot help, with what they mean where a log may not hold it any more."""
logger = logging.getLogger(__name__)


@dataclass
class Watched:
    """A child, and how it has been doing."""

    child: Child
    restarts: bool
    """It is started again when it dies."""
    state: Literal["waiting", "starting", "ready", "done"] = "waiting"
    due_s: float = 0.0
    """On the monotonic clock: when it is started (waiting), or has to be ready (starting)."""
    probe_s: float = 0.0
    deaths_s: deque[float] = field(default_factory=deque)
    """Within the last restart_window_s."""
    total_restarts: int = 0


class Supervisor:
    """Starts children and watches them. A context manager: leaving it, in whatever way, stops all, Redis last."""

    def __init__(
        self,
        settings: RunSettings,
        signals: Signals,
        *,
        on_change: Callable[[Sequence[Watched]], None] = lambda watched: None,
    ) -> None:
        self._settings, self._signals, self._on_change = settings, signals, on_change
        self._watched: list[Watched] = []

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        children = [one.child for one in reversed(self._watched) if one.child.pid() is not None]
        servers = [child for child in children if child.name == "redis"]
        for group in ([child for child in children if child not in servers], servers):
            stop(group, self._settings.stop_timeout_s, self._signals.impatient)
        self._watched.clear()
        self._on_change([])

    def start(self, child: Child, *, restarts: bool = True) -> None:
        """Starts it and returns at once; `run_until_done` waits for readiness."""
        watched = Watched(child, restarts)
        self._watched.append(watched)
        self._launch(watched)

    def run_until_ready(self) -> None:
        """
        Raises:
            StageFailed: a child was given up.
            KeyboardInterrupt, SystemExit: a signal came.
        """
        while any(one.state != "ready" for one in self._watched):
            self._round()

    def run_until_done(self, *names: str) -> None:
        """Returns when these children have ended with 0. Raises as `run_until_ready`."""
        while any(one.state != "done" for one in self._watched if one.child.name in names):
            self._round(names)

    def _round(self, may_end: Sequence[str] = ()) -> None:
        self._signals.check()
        for watched in self._watched:
            if watched.state != "done":
                self._look(watched, may_end=watched.child.name in may_end)
        time.sleep(LOOK_EVERY_S)

    def _look(self, watched: Watched, *, may_end: bool) -> None:
        now = time.monotonic()
        if watched.state == "waiting":
            if now >= watched.due_s:
                watched.total_restarts += 1
                self._launch(watched)
            return
        status = watched.child.exit_status()
        if status == 0 and may_end:
            self._change(watched, "done")
        elif status is not None:
            self._died(watched, status, ended_how(status))
        elif watched.state == "starting":
            self._probe(watched, now)

    def _probe(self, watched: Watched, now: float) -> None:
        if now < watched.probe_s:
            return
        if watched.child.ready():
            self._change(watched, "ready")
        elif now > watched.due_s:
            watched.child.kill()
            self._died(watched, None, f"not ready within {self._settings.start_timeout_s:g} s")
        watched.probe_s = time.monotonic() + PROBE_EVERY_S

    def _launch(self, watched: Watched) -> None:
        try:
            watched.child.start()
        except (MachineError, TransientError) as error:
            if watched.total_restarts == 0 or isinstance(error, StorageError):
                raise
            self._died(watched, None, str(error))
            return
        watched.due_s = time.monotonic() + self._settings.start_timeout_s
        self._change(watched, "starting")

    def _died(self, watched: Watched, status: int | None, how: str) -> None:
        child, settings, now = watched.child, self._settings, time.monotonic()
        deaths = watched.deaths_s
        deaths.append(now)
        while deaths[0] < now - settings.restart_window_s:
            deaths.popleft()
        if not watched.restarts or status in HOPELESS:
            raise StageFailed(_epitaph(child, f"failed ({how}{HOPELESS.get(status or 0, '')})"))
        if len(deaths) > settings.max_restarts:
            raise StageFailed(
                _epitaph(child, f"died {len(deaths)} times within {settings.restart_window_s:g} s, now: {how}")
            )
        pause_s = min(FIRST_PAUSE_S * 2 ** (len(deaths) - 1), LONGEST_PAUSE_S)
        logger.warning(
            "%s died (%s); restart %d of %d in %g s; its log: %s",
            *(child.name, how, len(deaths), settings.max_restarts, pause_s, child.log),
        )
        watched.due_s = now + pause_s
        self._change(watched, "waiting")

    def _change(self, watched: Watched, state: Literal["waiting", "starting", "ready", "done"]) -> None:
        watched.state = state
        self._on_change(self._watched)


def _epitaph(child: Child, what: str) -> str:
    last = last_line(child.log)
    return f"{child.name} {what}{f'; it said last: {last}' if last else ''}; its log: {child.log}"
