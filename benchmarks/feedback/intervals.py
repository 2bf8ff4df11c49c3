"""Means over seeds with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

T_975 = {2: 12.71, 3: 4.303, 5: 2.776, 10: 2.262}
"""Student's t by number of seeds."""


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of values, one a seed, and its 95 % interval."""
    half = T_975[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}
