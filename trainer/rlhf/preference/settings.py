"""Settings of step 2: simulated annotators and the reward model."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from rlhf.settings import Compute, Optimisation, Section


class RankSettings(Section):
    samples: Path | None = None
    """JSONL that `rlhf sample` wrote. None: the run's samples.jsonl."""
    out: Path | None = None
    """JSONL to write, one judgment a row. None: the run's comparisons.jsonl."""
    utility: str = "rlhf.data.world:annotators_taste"
    """What the annotators care about: `module:function` with a reward rule's signature; or JSONL of {"text", "label"}
    (positive or negative), for the log-odds of a classifier that is fitted from it. Empty: the run's
    data/annotators_labelled.jsonl."""
    reliabilities: tuple[float, ...] = (0.95, 0.85, 0.7)
    """One annotator each: the probability of ordering two completions as the utility does, averaged over the pairs."""
    judgments_per_prompt: PositiveInt = 1
    """Annotators who rank each prompt's completions, drawn at random."""
    tie_margin: float = Field(default=0.0, ge=0)
    """Completions whose perceived utilities differ by no more than this are ranked equal."""
    seed: NonNegativeInt = 0
    """Seed of who ranks what, and of their errors."""

    @field_validator("reliabilities")
    @classmethod
    def _at_least_chance(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0.5 <= r <= 1 for r in value):
            raise ValueError("needs at least one number, each from 0.5 (guesses) to 1 (never errs)")
        return value

    @model_validator(mode="after")
    def _enough_annotators(self) -> RankSettings:
        if self.judgments_per_prompt > len(self.reliabilities):
            raise ValueError("judgments_per_prompt must not exceed the annotators in reliabilities; nobody ranks twice")
        return self


class RewardModelSettings(Compute, Optimisation):
    comparisons: Path | None = None
    """JSONL of judgments. None: the run's comparisons.jsonl."""
    heldout_comparisons: Path | None = None
    """Judgments without noise of prompts of which none is in `comparisons`, for one more accuracy. None: the run's
    heldout_comparisons.jsonl, if there is one."""
    init_from: Path | None = None
    """Causal language model whose trunk the reward model starts from. None: the run's start model (run.model)."""
    out: Path | None = None
    """Folder to write. None: the run's reward-model/."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate; for a model of a million parameters. Larger ones take less, 1e-5 near a billion."""
    prompts_per_batch: PositiveInt = 8
    """Prompts per micro-batch, each with all pairs of all its judgments; its completions are scored once."""
    epochs: PositiveInt = 1
    """Passes over the judgments; more than one overfits rankings quickly."""
    max_length: PositiveInt = 512
    """Tokens of prompt and completion at most; longer items are refused with their line."""
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts kept for accuracy and calibration; a prompt's judgments stay together."""
    seed: NonNegativeInt = 0
    """Seed of head, split and order."""
