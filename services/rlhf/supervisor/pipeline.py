"""`rlhf run` and `rlhf demo`: the stages of a run in order, each as processes of their own, then the summary.

    world ─▶ pretrain ─▶ (sft) ─▶ sample ─▶ rank ─▶ reward-model ─▶ ppo ─▶ evaluate ─▶ report ─▶ summary.json
                                       Redis, policy × N, reward, reference, rollouts × N ─┘

A stage is skipped when its record holds the same settings and is newer than the records of the stages before it. One
that was interrupted goes on from its checkpoints; one whose settings or inputs have changed begins anew, on a clean
place.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from rich.console import Console

from rlhf.cli.records import StageRecord, stage_settings, started_path
from rlhf.cli.verbs import BY_NAME, Verb
from rlhf.errors import StageFailed
from rlhf.models.folders import read_json, write_json
from rlhf.observe.logs import configure_logging
from rlhf.settings.run import Settings
from rlhf.supervisor.group import group, stage_process
from rlhf.supervisor.lock import run_lock
from rlhf.supervisor.outputs import clear, clear_all, refuse_foreign
from rlhf.supervisor.signals import Signals
from rlhf.supervisor.summary import check_gain, collect, show
from rlhf.supervisor.supervisor import Supervisor, Watched

BY_HAND = "simulated annotators judged; to rank by hand: rlhf demo --annotate, or feedback.people = true in a run"
logger = logging.getLogger(__name__)


def run(settings: Settings, *, fresh: bool = False) -> None:
    """Runs all stages; blocks until they are done.

    Raises:
        StageFailed: a stage or process failed for good, the judge's score did not rise as demanded, or another
            supervisor holds the run.
        KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM or SIGHUP. No process is left.
    """
    paths = settings.paths
    if fresh:
        refuse_foreign(paths)
    with Signals() as signals, run_lock(paths.lock):
        configure_logging("run", file=paths.logs / "run.log")
        if fresh:
            clear_all(settings)
        write_json(paths.settings, settings.model_dump(mode="json"))
        Pipeline(settings, signals, Console()).run()


class Pipeline:
    """The stages of one run. Its caller holds the run's lock."""

    def __init__(self, settings: Settings, signals: Signals, console: Console) -> None:
        self._settings, self._signals, self._console = settings, signals, console
        self._newest_unix_s = 0.0
        """When the latest of the stages passed so far was finished."""

    def run(self) -> None:
        stages = self._settings.run.stages
        for number, name in enumerate(stages, start=1):
            self._pass(BY_NAME[name], f"[{number}/{len(stages)}]")
        summary = collect(self._settings)
        write_json(self._settings.paths.summary, summary)
        show(summary, self._settings, self._console)
        if self._settings.feedback.rounds and not self._settings.feedback.people:
            self._console.print(BY_HAND, highlight=False, markup=False, soft_wrap=True)
        check_gain(summary, self._settings)

    def _pass(self, verb: Verb, number: str) -> None:
        paths = self._settings.paths
        state = self.state(verb)
        if state != "done" or (verb.name == "ppo" and self._has_rounds_left()):
            if state == "anew":
                clear(verb.name, paths)
            again = ", going on where it was interrupted" if state == "interrupted" else ""
            self._say(f"{number} {verb.name}: {verb.help}{again}")
            self._run(verb)
        record = StageRecord.read(paths.stages, verb.name)
        if record is None:
            raise StageFailed(f"{verb.name} ended without a record in {paths.stages}; see {paths.logs}")
        if state == "done":
            self._say(f"{number} {verb.name}: done before, {record.seconds:.0f} s")
        self._newest_unix_s = max(self._newest_unix_s, record.finished_unix_s)

    def state(self, verb: Verb) -> Literal["done", "interrupted", "anew"]:
        """What is to be done about a stage, after those before it."""
        stages, decided = self._settings.paths.stages, stage_settings(verb, self._settings)
        started = started_path(stages, verb.name)
        if started.exists():
            inputs_are_older = started.stat().st_mtime >= self._newest_unix_s
            return "interrupted" if inputs_are_older and read_json(started) == decided else "anew"
        record = StageRecord.read(stages, verb.name)
        if record is not None and record.settings == decided and record.finished_unix_s >= self._newest_unix_s:
            return "done"
        return "anew"

    def _run(self, verb: Verb) -> None:
        settings = self._settings
        with Supervisor(settings.run, self._signals, on_change=self._write_processes) as supervisor:
            if verb.name == "ppo":
                for child in group(settings, trainer=self.state(verb) != "done"):
                    supervisor.start(child)
            else:
                supervisor.start(stage_process(verb.name, settings), restarts=False)
            supervisor.run_until_done(verb.name, "rounds")

    def _has_rounds_left(self) -> bool:
        """The trainer may be done before people are."""
        return bool(self._settings.feedback.rounds) and not self._settings.paths.rounds_finished.exists()

    def _write_processes(self, watched: Sequence[Watched]) -> None:
        """For `rlhf status` and `rlhf doctor`."""
        write_json(self._settings.paths.processes, [_described(one) for one in watched])

    def _say(self, text: str) -> None:
        self._console.print(f"{datetime.now():%H:%M:%S} {text}", highlight=False, markup=False)


def _described(watched: Watched) -> dict[str, Any]:
    child = watched.child
    return {
        "name": child.name,
        "state": watched.state,
        "pid": child.pid(),
        "restarts": watched.total_restarts,
        "address": child.address,
        "log": str(child.log),
    }
