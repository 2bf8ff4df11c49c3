"""Ragged token sequences to one right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pad(sequences: Sequence[Sequence[int] | NDArray[np.integer]], pad_id: int) -> tuple[Tensor, Tensor]:
    """
    Args:
        sequences: B token sequences, none of them empty.
        pad_id: written where a sequence has ended; never read back, since the mask says what counts.

    Returns:
        input_ids [B, T] int64 and attention_mask [B, T] bool, T the longest.

    Raises:
        ValueError: no sequences, or an empty one.
    """
    if not sequences or min(map(len, sequences)) == 0:
        raise ValueError("at least one sequence expected, and none of them empty")
    lengths = np.array([len(sequence) for sequence in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    return torch.from_numpy(ids), torch.from_numpy(mask)
