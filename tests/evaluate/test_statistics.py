"""Bootstrap intervals against theory, and the measure of variety."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.evaluate.statistics import Bigrams, bigrams, bootstrap_interval


def test_an_interval_is_what_theory_says_of_a_large_sample() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, size=400)
    low, high = bootstrap_interval(values, seed=1)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half_width, abs=0.03)
    assert high == pytest.approx(values.mean() + half_width, abs=0.03)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(size=30), seed=i, coverage=0.8) for i in range(100)]
    # 100 trials of probability 0.8: standard deviation 0.04. The percentile interval is a little narrow at 30 values.
    assert np.mean([low < 0 < high for low, high in intervals]) == pytest.approx(0.8, abs=0.12)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_equal_values_have_no_width() -> None:
    assert bootstrap_interval([0.5], seed=0) == (0.5, 0.5)
    assert bootstrap_interval([0.0] * 9, seed=0) == (0.0, 0.0)


def test_bigrams_are_counted_within_and_across_texts() -> None:
    assert bigrams(["a b c", "a b d"]) == Bigrams(distinct=3, total=4)
    assert bigrams(["a a a a"]) == Bigrams(distinct=1, total=3)
    assert bigrams(["The end", "the END"]) == Bigrams(distinct=1, total=2)
    assert bigrams(["The end", "the END"]).distinct_share == 0.5
    assert bigrams(["one", ""]).distinct_share == 0.0
