"""`rlhf evaluate --frontier`: what the reward model and the judge say, the farther a policy is from the initial one.

Two ways lead away from it, both by the proxy, which is the run's reward model (or rule): PPO, at the run's snapshots
and the finished policy, and the best of n completions of the initial policy. Where the judge's score falls while the
proxy's still rises, the proxy is over-optimised. `rlhf.evaluate.scaling` has the formulas; everything is paired by
prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.prompts import Prompt
from rlhf.data.sampling import sampling_of
from rlhf.errors import DataError
from rlhf.evaluate.findings import FORMS, sentences
from rlhf.evaluate.judge import Judge
from rlhf.evaluate.policies import Answer, Policy, load_like
from rlhf.evaluate.results import Fit, Form, Frontier, Point, write_frontier
from rlhf.evaluate.scaling import (
    Floats,
    Resamples,
    best_of_n_kl_bound,
    best_of_n_means,
    fit,
    percentile_interval,
)
from rlhf.evaluate.scoring import Rewards, kl_sums, score_items
from rlhf.models.causal import weights_sha256
from rlhf.models.snapshots import snapshots
from rlhf.observe.progress import progress
from rlhf.settings.run import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What the comparison before and after has loaded already."""

    settings: Settings
    prompts: Sequence[Prompt]
    initial: Policy
    initial_folder: Path
    after_folder: Path
    rewards: Rewards
    rewards_name: str
    judge: Judge

    def answers(self, policy: Policy, completions: int, on_finished: Callable[[], None]) -> list[Answer]:
        sampling, stopping = sampling_of(self.settings.sampling, completions, self.settings.evaluate.seed)
        return policy.answer(self.prompts, sampling, stopping, on_finished)

    def measured(self, answers: Sequence[Answer]) -> tuple[Floats, Floats]:
        """Proxy's and judge's scores, [P, K] each."""
        proxy, judge = self.rewards.score(answers), self.judge.judge(score_items(answers))
        return proxy.reshape(len(self.prompts), -1), judge.reshape(len(self.prompts), -1)


@dataclass(frozen=True)
class Measured:
    """One point, prompt by prompt."""

    form: Form
    name: str
    kl: Floats
    """[P] nats"""
    proxy_gain: Floats
    """[P], relative to the initial policy on the same prompt"""
    judge_gain: Floats


@dataclass(frozen=True)
class Initial:
    """The initial policy's N completions of each prompt."""

    proxy: Floats
    """[P, N]"""
    judge: Floats
    distinct_share: float


def run(given: Given) -> dict[str, Any]:
    """Measures, writes `frontier.json`, says what it found, and returns its figures.

    Raises:
        ModelError, TokenizerMismatch: a snapshot cannot be used.
        StorageError: the file cannot be written.
    """
    settings, evaluate = given.settings, given.settings.evaluate
    folders = dict(_policies(given))
    per_prompt = evaluate.frontier_samples + evaluate.frontier_completions * len(folders)
    with progress("frontier", total=len(given.prompts) * per_prompt, unit="completions") as bar:
        initial = _initial(given, bar.advance)
        measured = _best_of_n(initial)
        for name, folder in folders.items():
            measured.append(_snapshot(given, name, folder, initial, bar.advance))
    frontier = _frontier(given, initial, measured)
    write_frontier(settings.paths.frontier, frontier)
    for sentence in sentences(frontier):
        log.info("%s", sentence)
    log.info("wrote %d points to %s", len(frontier.points), settings.paths.frontier)
    return _figures(frontier)


def _policies(given: Given) -> Iterator[tuple[str, Path]]:
    """The snapshots, and the finished policy if it is no snapshot already."""
    taken = snapshots(given.settings.paths.snapshots)
    yield from ((f"step {step}", folder) for step, folder in taken.items())
    hashes = {weights_sha256(folder) for folder in taken.values()}
    if weights_sha256(given.after_folder) not in hashes:
        yield "policy", given.after_folder


def _initial(given: Given, on_finished: Callable[[], None]) -> Initial:
    answers = given.answers(given.initial, given.settings.evaluate.frontier_samples, on_finished)
    distinct = {(n // given.settings.evaluate.frontier_samples, *a.response_ids) for n, a in enumerate(answers)}
    return Initial(*given.measured(answers), len(distinct) / len(answers))


def _best_of_n(initial: Initial) -> list[Measured]:
    """n = 2, 4, 8, … as far as there are samples; n = 1 is the initial policy."""
    prompts, samples = initial.proxy.shape
    ns = [2**k for k in range(1, samples.bit_length()) if 2**k <= samples]
    proxy = best_of_n_means(initial.proxy, initial.proxy, ns) - initial.proxy.mean(1)
    judge = best_of_n_means(initial.proxy, initial.judge, ns) - initial.judge.mean(1)
    return [
        Measured("best_of_n", f"best of {n}", np.full(prompts, best_of_n_kl_bound(n)), proxy[i], judge[i])
        for i, n in enumerate(ns)
    ]


def _snapshot(given: Given, name: str, folder: Path, initial: Initial, on_finished: Callable[[], None]) -> Measured:
    evaluate, temperature = given.settings.evaluate, given.settings.sampling.temperature
    policy = load_like(given.initial, folder, evaluate.device, evaluate.dtype)
    answers = given.answers(policy, evaluate.frontier_completions, on_finished)
    kl = kl_sums(policy, given.initial, answers, temperature).reshape(len(given.prompts), -1)
    proxy, judge = given.measured(answers)
    gains = proxy.mean(1) - initial.proxy.mean(1), judge.mean(1) - initial.judge.mean(1)
    return Measured("rl", name, kl.mean(1), *gains)


def _frontier(given: Given, initial: Initial, measured: Sequence[Measured]) -> Frontier:
    settings, evaluate = given.settings, given.settings.evaluate
    resamples = Resamples.draw(len(given.prompts), evaluate.seed)
    fits, refused = _fits(measured, resamples)
    points = [_point(one, resamples) for one in measured]
    return Frontier(
        initial=str(given.initial_folder),
        reward=given.rewards_name,
        judge=given.judge.name,
        sampling=settings.sampling.model_dump(mode="json"),
        seed=evaluate.seed,
        prompts=len(given.prompts),
        samples=evaluate.frontier_samples,
        completions=evaluate.frontier_completions,
        proxy_initial=float(initial.proxy.mean()),
        judge_initial=float(initial.judge.mean()),
        distinct_share=initial.distinct_share,
        points=tuple(points),
        fits=fits,
        refused=refused,
    )


def _fits(measured: Sequence[Measured], resamples: Resamples) -> tuple[tuple[Fit, ...], dict[Form, str]]:
    fits, refused = [], {}
    remedy = {"best_of_n": "raise evaluate.frontier_samples", "rl": "train with a smaller ppo.snapshot_every"}
    for form in FORMS:
        own = [one for one in measured if one.form == form]
        shape = (len(own), resamples.weights.shape[1])
        kl, gain = (np.reshape([getattr(one, name) for one in own], shape) for name in ("kl", "judge_gain"))
        try:
            fits.append(fit(form, kl, gain, resamples))
        except DataError as error:
            refused[form] = f"{error}; {remedy[form]}"
    return tuple(fits), refused


def _point(one: Measured, resamples: Resamples) -> Point:
    values = np.stack([one.kl, one.proxy_gain, one.judge_gain])
    kl, proxy, judge = (float(mean) for mean in values.mean(1))
    intervals = [percentile_interval(draws) for draws in resamples.means(values).T]
    return Point(one.form, one.name, max(kl, 0.0), intervals[0], proxy, intervals[1], judge, intervals[2])


def _figures(frontier: Frontier) -> dict[str, Any]:
    figures: dict[str, Any] = {"frontier_points": len(frontier.points)}
    for fitted in frontier.fits:
        for name in ("alpha", "beta", "optimum_d", "optimum_gain"):
            figures[f"frontier_{fitted.form}_{name}"] = getattr(fitted, name)
            figures[f"frontier_{fitted.form}_{name}_interval"] = list(getattr(fitted, f"{name}_interval"))
    return figures
