"""What an evaluation found, as `rlhf evaluate` writes it and the report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import DataError
from rlhf.models.folders import read_json, write_json


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
