"""What must hold while the trainer runs, as pure functions of a step's figures and a short history.

Three kinds, by how a violation is to be read:

- exact, or exact up to rounding: first_ratio, start_kl, policy_logprobs, sampling, tokenizer, padding, replica_weights,
  entropy. Something computes another thing than it says.
- a range that a healthy run stays in: negative_kl, explained_variance, clip_fraction, gradient. A setting is wrong for
  this task, or something above is.
- the reward's own weakness: length, ngrams. The optimiser has found what the reward model cannot tell from quality.

Each has one check, which answers what was seen or None, one remedy, and one field in `MonitorSettings`. A quantity that
a run does not have (no critic, no fresh rollouts, too few steps) is no violation. `rlhf.ppo.watched` measures what is
not among the figures of `metrics.jsonl`; `rlhf.ppo.monitor` acts on what is found here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from rlhf.ppo.agreement import MEAN_SHARE, Agreement, cause
from rlhf.ppo.settings import MonitorSettings
from rlhf.wire.records import WeightVersion

Figures = Mapping[str, float | None]
"""Of one step, by their names in metrics.jsonl; None: the run has no such quantity."""

ENTROPY_ROUNDING = 1e-4
"""Nats, of a mean over tokens in float32."""
WARM_UP_WINDOWS = 4
"""Windows before the critic has to be of use."""


@dataclass(frozen=True)
class Diagnosis:
    name: str
    """Of the field in `MonitorSettings`."""
    severity: Literal["warn", "stop"]
    what: str
    """What was seen, with numbers and bound."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}. {self.remedy}"


@dataclass(frozen=True)
class Published:
    version: WeightVersion
    held: Mapping[str, WeightVersion]
    """By replica's name, what each that answered said to hold afterwards."""


@dataclass(frozen=True)
class Watched:
    """What a batch and the replicas show beside the figures."""

    policies: Sequence[Agreement] = ()
    """The policy service's log-probs against the trainer's of the same weights: of each version in the batch that is
    the trainer's own, and of each replica that was probed."""
    reference: Agreement | None = None
    """The reference's log-probs against the trainer's. None: not before the first step."""
    other_sampling: Sequence[str] = ()
    """How rollouts were sampled that were not sampled as the trainer computes; distinct ones."""
    other_texts: int = 0
    """Completions whose tokens are not their text."""
    texts: int = 0
    """Completions that were looked at for this."""
    tokens_after_end: int = 0
    """Sampled tokens that come after an end token of their completion."""
    tokens: int = 0
    """Sampled tokens."""
    publishes: Sequence[Published] = ()
    """Since the step before."""


@dataclass(frozen=True)
class Rules:
    """What decides whether an invariant holds, beside the settings: facts of the run."""

    settings: MonitorSettings
    logprob_bound: float
    """Nats."""
    vocab_size: int
    recomputes: bool
    """Old log-probs are the trainer's own: the first ratio is exactly 1."""
    policy_learns_from: int = 1
    """The first step in which the policy changes; before it only the critic learns."""
    drops_out: bool = False
    """Updates compute with dropout, which no first ratio is 1 under."""


@dataclass(frozen=True)
class History:
    """Figures of earlier steps."""

    start: Sequence[Figures]
    """Of the first window of the run."""
    recent: Sequence[Figures]
    """Of the window before this step, oldest first, as far as there were steps."""


@dataclass(frozen=True)
class Step:
    """All that the checks see."""

    number: int
    """From 1."""
    figures: Figures
    watched: Watched
    history: History
    rules: Rules

    def of(self, name: str) -> float:
        """NaN where the run has no such quantity; comparisons with it are false."""
        value = self.figures.get(name)
        return math.nan if value is None else value

    def at_start(self, name: str) -> float:
        """Mean over the first window; NaN until the window up to now shares no step with it."""
        window = self.rules.settings.window
        if self.number < 2 * window or len(self.history.start) < window:
            return math.nan
        return _mean(name, self.history.start)

    def now(self, name: str) -> float:
        """Mean over the window up to this step."""
        return _mean(name, self._window)

    def median(self, name: str) -> float:
        """Over the window up to this step; NaN where it is not full."""
        values = _values(name, self._window)
        return median(values) if len(values) == self.rules.settings.window else math.nan

    @property
    def _window(self) -> Sequence[Figures]:
        return [*self.history.recent, self.figures][-self.rules.settings.window :]


def diagnose(step: Step) -> list[Diagnosis]:
    """Every invariant that this step violates and whose setting is not `off`."""
    found = []
    for name, check in CHECKS.items():
        severity = getattr(step.rules.settings, name)
        what = None if severity == "off" else check(step)
        if what is not None:
            found.append(Diagnosis(name, severity, what, REMEDIES[name]))
    return found


def _policy_logprobs(step: Step) -> str | None:
    bound = step.rules.logprob_bound
    for found in step.watched.policies:
        if not found.within(bound):
            return (
                f"the log-probs of {found.of} differ from the trainer's, of the same weights, by up to "
                f"{found.largest:.2g} nats and {found.mean:.2g} on average, where {bound:g} and "
                f"{MEAN_SHARE * bound:g} are due to rounding; {cause(found, bound)}"
            )
    return None


def _start_kl(step: Step) -> str | None:
    found, bound = step.watched.reference, step.rules.logprob_bound
    if step.number != 1 or found is None or found.within(bound):
        return None
    return (
        f"before the first step, log-probs of policy and reference differ by up to {found.largest:.2g} nats and "
        f"{found.mean:.2g} on average, where {bound:g} and {MEAN_SHARE * bound:g} are due to rounding "
        f"(KL {step.of('kl_mean'):.2g} nats per completion)"
    )


def _first_ratio(step: Step) -> str | None:
    error = step.of("first_ratio_error")
    if step.rules.drops_out:
        return None
    if step.rules.recomputes:
        bound, why = 0.0, "with recomputed old log-probs it is exactly 0"
    elif step.of("staleness_mean") > 0:
        return None
    else:
        bound = math.expm1(step.rules.logprob_bound)
        why = f"with the policy service's log-probs rounding explains {bound:.2g}"
    return None if error <= bound else f"|ratio - 1| was up to {error:.2g} before the first update; {why}"


def _sampling(step: Step) -> str | None:
    others = step.watched.other_sampling
    return f"rollouts were sampled with {'; with '.join(others)}" if others else None


def _tokenizer(step: Step) -> str | None:
    watched = step.watched
    if not watched.other_texts:
        return None
    return f"the tokens of {watched.other_texts} of {watched.texts} completions decode to another text than theirs"


def _padding(step: Step) -> str | None:
    watched = step.watched
    if not watched.tokens_after_end:
        return None
    return f"{watched.tokens_after_end} of {watched.tokens} sampled tokens come after an end token of their completion"


def _replica_weights(step: Step) -> str | None:
    for published in step.watched.publishes:
        astray = [f"{name} holds {held}" for name, held in published.held.items() if held != published.version]
        if astray:
            return f"{published.version} was published, and then {', '.join(astray)}"
    return None


def _entropy(step: Step) -> str | None:
    entropy, most = step.of("entropy"), math.log(step.rules.vocab_size)
    if entropy < -ENTROPY_ROUNDING:
        return f"the mean entropy is {entropy:.3g} nats per token, and none is below 0"
    if entropy > most + ENTROPY_ROUNDING:
        return f"the mean entropy is {entropy:.3g} nats per token, and {step.rules.vocab_size} tokens allow {most:.3g}"
    return None


def _negative_kl(step: Step) -> str | None:
    kl, error, sigmas = step.of("kl_mean"), step.of("kl_standard_error"), step.rules.settings.negative_kl_sigmas
    rounding = MEAN_SHARE * step.rules.logprob_bound * step.of("response_tokens_mean")
    # Of stale rollouts the estimate is of tokens that another policy sampled, and may be negative.
    if step.of("staleness_mean") > 0 or not kl < -(sigmas * error + rounding):
        return None
    return f"the mean KL is {kl:.3g} nats per completion, and {sigmas:g} standard errors are {sigmas * error:.3g}"


def _explained_variance(step: Step) -> str | None:
    settings, found = step.rules.settings, step.median("explained_variance")
    if step.number < WARM_UP_WINDOWS * settings.window or not found < settings.explained_variance_min:
        return None
    least = settings.explained_variance_min
    return f"explained variance was {found:.2g} in the middle of the last {settings.window} steps, {least:g} at least"


def _clip_fraction(step: Step) -> str | None:
    settings, found = step.rules.settings, step.median("clip_fraction")
    if not found > settings.clip_fraction_max:
        return None
    most = settings.clip_fraction_max
    return f"{found:.0%} of tokens were clipped in the middle of the last {settings.window} steps, {most:.0%} at most"


def _gradient(step: Step) -> str | None:
    settings = step.rules.settings
    for model in ("policy", "critic"):
        name = f"{model}_grad_norm"
        norm, before = step.of(name), _values(name, step.history.recent)[-settings.window :]
        if len(before) < settings.window:
            continue
        usual = median(before)
        most = settings.gradient_factor * usual
        if norm > most > 0:
            return f"the {model}'s gradient has norm {norm:.3g}, after {usual:.3g} before; {most:.3g} at most"
        learns = model == "critic" or step.number - settings.window >= step.rules.policy_learns_from
        if learns and norm == 0 and not any(before):
            return f"the {model}'s gradient has been 0 for {settings.window} steps: nothing is learned"
    return None


def _length(step: Step) -> str | None:
    rise = _rise(step)
    if rise is None:
        return None
    factor, found = step.rules.settings.length_factor, []
    before, now = step.at_start("response_tokens_mean"), step.now("response_tokens_mean")
    if now > factor * before:
        found.append(f"completions grew from {before:.3g} to {now:.3g} tokens, to {factor * before:.3g} at most")
    ended_before, ended = step.at_start("ended_fraction"), step.now("ended_fraction")
    if ended < ended_before / factor:
        least = ended_before / factor
        found.append(f"the share that ends by itself fell from {ended_before:.3g} to {ended:.3g}, {least:.3g} at least")
    return f"{rise}, and {' and '.join(found)}" if found else None


def _ngrams(step: Step) -> str | None:
    before, now = step.at_start("distinct_bigrams"), step.now("distinct_bigrams")
    least = before / step.rules.settings.ngram_factor
    if not now < least:
        return None
    while_ = _rise(step) or f"the score stayed at {step.now('score_mean'):.2g}"
    return f"{while_}, and distinct token pairs fell from {before:.0%} to {now:.0%} of all, {least:.0%} at least"


def _rise(step: Step) -> str | None:
    """How the score has risen against the start; None: it has not."""
    before, now = step.at_start("score_mean"), step.now("score_mean")
    if not now > before + step.rules.settings.score_rise * step.at_start("score_std"):
        return None
    return f"the score rose from {before:.2g} to {now:.2g}"


def _values(name: str, rows: Sequence[Figures]) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None and math.isfinite(value)]


def _mean(name: str, rows: Sequence[Figures]) -> float:
    values = _values(name, rows)
    return fmean(values) if values else math.nan


CHECKS: Mapping[str, Callable[[Step], str | None]] = {
    "first_ratio": _first_ratio,
    "start_kl": _start_kl,
    "policy_logprobs": _policy_logprobs,
    "sampling": _sampling,
    "tokenizer": _tokenizer,
    "padding": _padding,
    "replica_weights": _replica_weights,
    "entropy": _entropy,
    "negative_kl": _negative_kl,
    "explained_variance": _explained_variance,
    "clip_fraction": _clip_fraction,
    "gradient": _gradient,
    "length": _length,
    "ngrams": _ngrams,
}

REMEDIES: Mapping[str, str] = {
    "first_ratio": "Two forward passes over the same weights differ: look for dropout that is on, or for kernels that "
    "are not deterministic",
    "start_kl": "The reference is not what the policy starts from, or computes at another temperature: check "
    "reference.model, ppo.model and run.model, and ask `rlhf doctor`",
    "policy_logprobs": "The ratio and the KL mean nothing until these agree: ask `rlhf doctor`, which asks each "
    "replica, and start again the one that it names",
    "sampling": "Start worker and trainer with the same [sampling], without filters",
    "tokenizer": "Let policy and trainer load one tokenizer (policy.model, ppo.model)",
    "padding": "Whoever makes the rollouts must cut each completion behind its first end token, or mask the rest",
    "replica_weights": "It follows by itself within policy.weights_grace_s; if not, see its log, or start it again",
    "entropy": "Logits or their mask are wrong: a mean over padding, a sum for a mean, or weights that are not finite",
    "negative_kl": "A KL is never negative: tokens were not sampled from the distribution whose log-probs count; check "
    "temperature, filters and masks",
    "explained_variance": "Raise critic.lr or critic.warmup_steps, start the critic from the reward model, or use an "
    "estimator without a critic (ppo.estimator)",
    "clip_fraction": "Lower ppo.lr or ppo.epochs, or raise ppo.batch_prompts",
    "gradient": "After a leap: look at the newest sample table for scores out of proportion, lower the learning rate, "
    "or set ppo.score_clip. If it is 0: all rewards are alike, or the parameters are frozen",
    "length": "Read the newest sample tables; give a length penalty or missing_eos_penalty, raise kl.coef, or train "
    "the reward model on pairs of equal length",
    "ngrams": "Read the newest sample tables; raise kl.coef, or stop at an earlier checkpoint",
}
