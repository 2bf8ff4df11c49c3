"""What a scorer reads and answers, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.wire.records import Floats


@dataclass(frozen=True)
class Reading:
    """What a reward model reads of one item: its tokens and one end token, if the context has room for it."""

    token_ids: NDArray[np.integer[Any]]
    """[T + 1], or [T] where the item ends with an end token or fills the context."""
    prompt_length: int
    length: int
    """T, of the item itself."""


@dataclass(frozen=True)
class Score:
    """Of one completion."""

    score: float
    token_rewards: Floats
    """[completion tokens]; of a rule, none."""
    members: Floats
    """[M], each normalised by itself. Their standard deviation is the spread that comes with the score."""


@dataclass(frozen=True)
class About:
    """What the service says of itself."""

    kind: str
    model_sha256: str
    tokenizer_sha256: str
    mean: float
    std: float
    members: int = 1
