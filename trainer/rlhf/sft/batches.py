"""The order of rows over epochs: a function of seed and position alone, so that a resumed run goes on with the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")


def shuffled_batches(rows: Sequence[Row], batch_size: int, seed: int) -> Callable[[int], list[Row]]:
    """Batch n of an endless sequence: each epoch has all rows once, in an order of its own, the last batch the rest."""
    per_epoch = batches_per_epoch(len(rows), batch_size)
    order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)))

    def batch(index: int) -> list[Row]:
        epoch, place = divmod(index, per_epoch)
        return [rows[number] for number in order(epoch)[place * batch_size : (place + 1) * batch_size]]

    return batch


def batches_per_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)
