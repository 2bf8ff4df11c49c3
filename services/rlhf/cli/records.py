"""What is kept of a stage: `stages/<verb>.json` when it is done, `stages/<verb>.started` while it is not."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rlhf.cli.verbs import Verb
from rlhf.errors import StageFailed
from rlhf.models.folders import read_json, write_json
from rlhf.settings.run import Settings


@dataclass(frozen=True)
class StageRecord:
    """A finished stage."""

    verb: str
    seconds: float
    """Wall time of the process that finished it."""
    finished_unix_s: float
    settings: Mapping[str, Any]
    """`stage_settings` as it ran with them."""
    figures: Mapping[str, Any]
    """What the stage measured."""

    @classmethod
    def read(cls, stages: Path, verb: str) -> Self | None:
        """None: the stage has not been finished.

        Raises:
            StageFailed: the file is there and is no record.
        """
        path = stages / f"{verb}.json"
        if not path.exists():
            return None
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise StageFailed(f"{path} is no record of a stage: {error}; remove it to run the stage again") from error

    def write(self, stages: Path) -> None:
        write_json(stages / f"{self.verb}.json", asdict(self))
        started_path(stages, self.verb).unlink(missing_ok=True)


def stage_settings(verb: Verb, settings: Settings) -> dict[str, Any]:
    """Everything that decides the stage's result, as JSON values: `{"ppo": {…}, "reward.rule": ""}`."""
    content = settings.model_dump(mode="json")
    decided: dict[str, Any] = {}
    for name in (verb.section, *verb.decided_by):
        section, _, field = name.partition(".")
        decided[name] = content[section][field] if field else content[section]
    for name in verb.regardless_of:
        del decided[verb.section][name]
    return decided


def started_path(stages: Path, verb: str) -> Path:
    """Holds `stage_settings` from the stage's start to its end; its mtime says when the stage was first started."""
    return stages / f"{verb}.started"


def note_start(verb: Verb, settings: Settings) -> None:
    """Marks a stage as begun, unless it already is with the same settings."""
    path = started_path(settings.paths.stages, verb.name)
    decided = stage_settings(verb, settings)
    if not path.exists() or read_json(path) != decided:
        write_json(path, decided)


def note_end(verb: Verb, settings: Settings, figures: Mapping[str, Any], seconds: float) -> StageRecord:
    record = StageRecord(
        verb.name, round(seconds, 2), round(time.time(), 2), stage_settings(verb, settings), dict(figures)
    )
    record.write(settings.paths.stages)
    return record
