from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.models.padding import pad


def test_right_padded_with_mask() -> None:
    ids, mask = pad([[1, 2, 3], np.array([4], dtype=np.int32)], 9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_nothing_to_pad(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="none of them empty"):
        pad(sequences, 0)
