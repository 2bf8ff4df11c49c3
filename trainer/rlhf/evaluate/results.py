"""What an evaluation found, as `rlhf evaluate` writes it and the report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import DataError
from rlhf.models.folders import read_json, write_json

Form = Literal["best_of_n", "rl"]
Interval = tuple[float | None, float | None]
"""95 %, from a bootstrap over prompts; None for infinity."""


@dataclass(frozen=True)
class Pair:
    """One held-out prompt, answered by both policies with the same random numbers."""

    prompt: str
    before: str
    """Completion of the initial policy."""
    after: str
    """Completion of the improved policy."""
    reward_before: float
    reward_after: float
    judge_before: float
    judge_after: float
    kl: float
    """Nats: log p(after's tokens) under the improved policy minus the same under the initial one."""
    response_tokens_before: int
    """The end token included."""
    response_tokens_after: int
    ended_before: bool
    """The policy ended the response itself; False: it was cut at the limit."""
    ended_after: bool


@dataclass(frozen=True)
class Evaluation:
    before: str
    """Folder of the initial policy."""
    after: str
    """Folder of the improved policy."""
    reward: str
    """Folder of the reward model, or name of the rule."""
    judge: str
    """File that the judge was fitted from, or name of the rule."""
    sampling: Mapping[str, Any]
    seed: int
    figures: Mapping[str, Any]
    """Means over the pairs and their 95 % bootstrap intervals [low, high]; see `rlhf.evaluate.compare`."""
    pairs: tuple[Pair, ...]
    """All prompts, in the order of their file."""


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """
    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    write_json(path, asdict(evaluation))


def read_evaluation(path: Path) -> Evaluation:
    """
    Raises:
        DataError: not what `write_evaluation` writes.
    """
    try:
        fields = read_json(path)
        return Evaluation(**fields | {"pairs": tuple(Pair(**pair) for pair in fields["pairs"])})
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"is no evaluation: {error}; run `rlhf evaluate` again", path=path) from error


@dataclass(frozen=True)
class Point:
    """A policy at a distance from the initial one. Gains are relative to the initial policy, paired by prompt."""

    form: Form
    """What leads there."""
    name: str
    """`best of 4`, `step 12`, or `policy` for the finished one."""
    kl: float
    """Nats per completion. Best-of-n: the bound log n − (n − 1) / n, which depends on no prompt."""
    kl_interval: Interval
    proxy_gain: float
    """Of what was trained against."""
    proxy_gain_interval: Interval
    judge_gain: float
    judge_gain_interval: Interval


@dataclass(frozen=True)
class Fit:
    """The judge's gain as a function of d = √KL, and where it is largest; see `rlhf.evaluate.scaling`."""

    form: Form
    points: int
    alpha: float
    alpha_interval: Interval
    beta: float
    beta_interval: Interval
    optimum_d: float | None
    """None: the fitted curve has no peak, or one that no measurement speaks of; see `scaling.SPEAKS_OF`."""
    optimum_d_interval: Interval
    optimum_gain: float | None
    optimum_gain_interval: Interval
    optimum_share: float
    """Of the resamples, those whose optimum lies no farther than the farthest point: how sure it is that the judge's
    score has turned."""
    farthest_d: float
    """Of the points. An optimum beyond it is an extrapolation."""
    misfit: float
    """Root mean square of what the curve is off by at the points, in units of the gain."""
    curve: tuple[tuple[float, float, float, float], ...]
    """d, gain, and the gain's interval, from 0 to the farthest point."""


@dataclass(frozen=True)
class Frontier:
    """What `rlhf evaluate --frontier` found."""

    initial: str
    """Folder of the initial policy."""
    reward: str
    """The proxy: folder of the reward model, or name of the rule."""
    judge: str
    sampling: Mapping[str, Any]
    seed: int
    prompts: int
    samples: int
    """N, completions of the initial policy per prompt, that best-of-n chooses from."""
    completions: int
    """Of each snapshot, per prompt."""
    proxy_initial: float
    """Mean of the initial policy's scores."""
    judge_initial: float
    distinct_share: float
    """Different completions among a prompt's N, averaged. The fewer there are, the looser is the bound on best-of-n's
    KL."""
    points: tuple[Point, ...]
    """Best-of-n by n, then PPO in the order of training."""
    fits: tuple[Fit, ...]
    refused: Mapping[Form, str]
    """Forms without a fit, and why."""


def write_frontier(path: Path, frontier: Frontier) -> None:
    """
    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    write_json(path, asdict(frontier))


def read_frontier(path: Path) -> Frontier:
    """
    Raises:
        DataError: not what `write_frontier` writes.
    """
    try:
        fields = read_json(path)
        points, fits = (tuple(map(_tuples, fields[name])) for name in ("points", "fits"))
        own = {"points": tuple(Point(**point) for point in points), "fits": tuple(Fit(**fit) for fit in fits)}
        return Frontier(**fields | own)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"is no frontier: {error}; run `rlhf evaluate --frontier` again", path=path) from error


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As they were before JSON, which has only lists."""
    made = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return made | {"curve": tuple(map(tuple, made["curve"]))} if "curve" in made else made
