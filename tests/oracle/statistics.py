"""Whether what was measured agrees with what is known."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_Z = 4.5
"""Of at most some hundred normal numbers none is beyond this in 999 of 1000 draws; the draws are seeded."""


def assert_mean_is(samples: Tensor, expected: Tensor, *, precision: float = 0.08) -> None:
    """A z-test in every coordinate.

    Args:
        samples: [batches, parameters], independent.
        expected: [parameters]
        precision: the sampling error may be this share of what is expected, in norm, or the test would see too little.
    """
    mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    assert error.norm() < precision * expected.norm(), f"{error.norm() / expected.norm():.3f}: more batches are needed"
    # Float32 rounds where nothing varies.
    z = (mean - expected) / (error + 1e-6 * expected.abs().max())
    worst = int(z.abs().argmax())
    assert z.abs().max() < LARGEST_Z, (
        f"parameter {worst}: {mean[worst]:.5f} ± {error[worst]:.5f} measured, {expected[worst]:.5f} expected "
        f"(z = {z[worst]:.1f}; in norm {torch.dist(mean, expected) / expected.norm():.2%} off)"
    )
