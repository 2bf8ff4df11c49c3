"""Settings of evaluation and report."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from rlhf.settings import Compute


class EvaluateSettings(Compute):
    before: Path | None = None
    """Folder of the initial policy. None: the run's start model (run.model)."""
    after: Path | None = None
    """Folder of the improved policy. None: the run's policy/."""
    reward_model: Path | None = None
    """Folder of the reward model. None, and no rule: the one that PPO had, the last after rounds of feedback."""
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
    frontier: bool = False
    """Also measure reward and judge against the distance from the initial policy: at the run's snapshots
    (ppo.snapshot_every) and with the best of n completions of the initial policy."""
    frontier_samples: int = Field(default=64, ge=2, le=4096)
    """Completions of the initial policy per prompt that best-of-n chooses from; n is 2, 4, 8, … up to it."""
    frontier_completions: PositiveInt = 4
    """Completions of each snapshot per prompt."""

    @model_validator(mode="after")
    def _one_source_of_rewards(self) -> EvaluateSettings:
        if self.reward_rule and self.reward_model is not None:
            raise ValueError("reward_model and reward_rule exclude each other; leave one of them out")
        return self
