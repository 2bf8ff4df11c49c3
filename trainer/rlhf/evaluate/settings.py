"""Settings of evaluation and report."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt, model_validator

from rlhf.settings import Compute


class EvaluateSettings(Compute):
    before: Path | None = None
    """Folder of the initial policy. None: the run's start model (run.model)."""
    after: Path | None = None
    """Folder of the improved policy. None: the run's policy/."""
    reward_model: Path | None = None
    """Folder of the reward model. None, and no rule: the run's reward-model/."""
    reward_rule: str = ""
    """A rule instead of a reward model, as `module:function`."""
    prompts: Path | None = None
    """Held-out prompts. None: the run's data/heldout_prompts.jsonl."""
    limit: PositiveInt = 256
    """Prompts taken from the start of the file."""
    judge: str = ""
    """Rule `module:function`, or JSONL of {"text", "label"} (positive or negative) from which a classifier is fitted.
    Empty: the run's data/labelled.jsonl."""
    pairs: NonNegativeInt = 3
    """Before/after pairs printed."""
    seed: NonNegativeInt = 1000
    """Seed of sampling: before and after use the same."""

    @model_validator(mode="after")
    def _one_source_of_rewards(self) -> EvaluateSettings:
        if self.reward_rule and self.reward_model is not None:
            raise ValueError("reward_model and reward_rule exclude each other; leave one of them out")
        return self
