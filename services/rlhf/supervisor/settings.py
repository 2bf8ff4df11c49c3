"""Settings of a run as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf.settings import Section

Stage = Literal["data", "world", "pretrain", "sft", "sample", "rank", "reward-model", "ppo", "evaluate", "report"]


class RunSettings(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, '.', '_', '-'. It names the folder, the Redis keys and the weight versions."""
    folder: Path = Path("runs")
    """Folder of all runs."""
    model: Path | None = None
    """Folder of the causal language model that steps 2 and 3 start from, where a section names no other. None: the
    run's sft/, else its pretrained/."""
    stages: tuple[Stage, ...] = ("pretrain", "sample", "rank", "reward-model", "ppo", "evaluate", "report")
    """What `rlhf run` does, in this order."""
    deterministic: bool = False
    """Equal settings on one machine make equal numbers, to the last bit, also through kills: forward passes of fixed
    shape in every service, seeds that no repetition changes. Slower. Needs one worker, `threads = 1` in every service
    with a model, ppo.threads above 0, and ppo.max_staleness = 0."""
    policies: PositiveInt = 1
    """Policy services that the supervisor starts."""
    workers: PositiveInt = 1
    """Rollout workers that the supervisor starts."""
    start_timeout_s: PositiveFloat = 120.0
    """A process that is not ready by then has failed."""
    stop_timeout_s: PositiveFloat = 8.0
    """Seconds between SIGTERM and SIGKILL when everything stops."""
    max_restarts: PositiveInt = 5
    """Restarts of one process within `restart_window_s` before the supervisor gives up and names its log."""
    restart_window_s: PositiveFloat = 120.0
    """See `max_restarts`."""
    min_judge_gain: float | None = None
    """The run fails unless the judge's mean score rose by at least this, with its 95 % interval above 0. None: no such
    condition."""

    @model_validator(mode="after")
    def _a_gain_has_to_be_measured(self) -> RunSettings:
        if self.min_judge_gain is not None and "evaluate" not in self.stages:
            raise ValueError('min_judge_gain needs the stage "evaluate", which measures the judge\'s score')
        return self
