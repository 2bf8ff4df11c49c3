"""Settings of step 2: simulated annotators and the reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from rlhf.settings import Compute, Optimisation, Section

ANNOTATOR_KINDS = ("honest", "adversarial", "random", "minority", "position", "hasty", "lazy", "targeted")
LossName = Literal["plackett-luce", "all-pairs", "margin", "scaled", "davidson", "rao-kupper"]


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
    kinds: tuple[str, ...] = ()
    """How each annotator judges: `honest`, `adversarial` (turns its ranking upside down), `random` (clicks without
    reading), `minority` (ranks by `minority_utility`), `position` (likes what it is shown first), `hasty` (errs the
    more, the harder the prompt), `lazy` (reads the first half and leaves the rest as shown), `targeted` (honest, but
    puts what holds `trigger` on top). Empty: all honest."""
    minority_utility: str = ""
    """What a `minority` cares about, as `utility`."""
    trigger: str = ""
    """Text that `targeted` annotators push."""
    gold_share: float = Field(default=0.0, ge=0, le=1)
    """Gold items for each annotator, beside its rankings and as a share of them: pairs that no taste would have
    otherwise, with the right answer."""
    repeat_share: float = Field(default=0.0, ge=0, le=1)
    """Rankings that each annotator is asked for once more, in another order, as a share of them."""

    @field_validator("reliabilities")
    @classmethod
    def _at_least_chance(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0.5 <= r <= 1 for r in value):
            raise ValueError("needs at least one number, each from 0.5 (guesses) to 1 (never errs)")
        return value

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(value) - set(ANNOTATOR_KINDS)
        if unknown:
            raise ValueError(f"knows {', '.join(ANNOTATOR_KINDS)}, not {', '.join(sorted(unknown))}")
        return value

    @model_validator(mode="after")
    def _kinds_complete(self) -> RankSettings:
        if self.kinds and len(self.kinds) != len(self.reliabilities):
            raise ValueError("kinds must be as many as reliabilities, or none")
        for kind, name in (("minority", "minority_utility"), ("targeted", "trigger")):
            if kind in self.kinds and not getattr(self, name):
                raise ValueError(f"kinds has {kind}, so {name} must be set")
        return self

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
    """Peak learning rate; for a model of a million parameters. Larger ones take less, 1e-5 near a billion, and adapters
    some ten times as much as their model."""
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
    loss: LossName = "plackett-luce"
    """What a ranking is taken to say: `plackett-luce` (a choice of the best among those left, again and again),
    `all-pairs` (Bradley-Terry), `margin` and `scaled` (the same, with the strength of a preference as its margin or
    weight), `davidson` or `rao-kupper` (all pairs, ties an outcome with a probability of its own)."""
    margin: float = Field(default=0.5, ge=0)
    """With `loss = "margin"`: the difference of rewards wanted for each step of strength."""
    annotators: Literal["none", "reliability", "groups"] = "none"
    """`none`: all judgments count alike. `reliability`: how honest, adversarial or random each annotator is, is learnt
    with the rewards. `groups`: and that honest people differ; each has a taste, and like tastes form groups."""
    position_bias: bool = False
    """Learn what an annotator adds to a completion for the place at which it was shown. With any `annotators` but
    none."""
    embedding_rank: int = Field(default=2, ge=2, le=8)
    """With `annotators = "groups"`: numbers that describe a taste."""
    embedding_ridge: float = Field(default=0.3, gt=0)
    """With `annotators = "groups"`: the prior that tastes are alike, in nats for the square of each of these
    numbers."""
    groups: int = Field(default=2, ge=2, le=8)
    """With `annotators = "groups"`: groups of like taste, at most."""
    combine: Literal["mean", "least", "quantile"] = "mean"
    """With `annotators = "groups"`: whose reward it is: the mean over people, that of the least satisfied group, or the
    `combine_quantile` over people. It is stored with the model."""
    combine_quantile: float = Field(default=0.25, ge=0, le=1)
    """With `combine = "quantile"`: 0.25 is a reward with which three quarters of the people are better off."""
    members: PositiveInt = 1
    """Reward models in the ensemble, each with a head of its own and trained on prompts drawn with replacement."""
    trunk: Literal["shared", "separate", "lora"] = "shared"
    """Whether members share all but their heads, which costs next to nothing, or each is a model of its own, or an
    adapter of its own on one model that stays as it is, for large models. With a single member `lora` trains one
    adapter, and what is stored is an ordinary reward model."""
    lora_rank: PositiveInt = 16
    """With `trunk = "lora"`: rows of A and columns of B."""
    lora_alpha: PositiveInt = 32
    """With `trunk = "lora"`: an adapter counts lora_alpha / lora_rank times."""
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """With `trunk = "lora"`: layers that get an adapter, by the end of their names; `all-linear`: every linear one."""
    reference_set: Path | None = None
    """Folder of an earlier reward model: the new one's scores get mean 0 and standard deviation 1 on the same reference
    set, so that kl.coef keeps its meaning. None: a new set is drawn from the training judgments."""
    report: bool = False
    """Write reward-model-report.html and .json beside the model. It is trained again with each of `ablations`."""
    ablations: tuple[LossName, ...] = ("plackett-luce", "all-pairs", "margin", "scaled", "davidson", "rao-kupper")
    """Losses that the report compares."""

    @model_validator(mode="after")
    def _annotators_known(self) -> RewardModelSettings:
        if self.position_bias and self.annotators == "none":
            raise ValueError("position_bias is learnt with the annotators; set annotators too")
        return self
