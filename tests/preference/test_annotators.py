"""The noise of simulated annotators: reliability as stated, Plackett-Luce rankings, ties within the margin."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.preference.annotators import Annotator, mean_reliability, noise_scale_for, pair_differences, ranks_of

GROUPS = [np.random.default_rng(3).normal(size=4) for _ in range(500)]
TEXTS = ("a", "b", "c", "d")


@pytest.mark.parametrize("reliability", [0.55, 0.7, 0.85, 0.95, 0.999])
def test_the_noise_scale_gives_the_stated_reliability(reliability: float) -> None:
    differences = pair_differences(GROUPS)
    scale = noise_scale_for(reliability, differences)
    assert mean_reliability(differences, scale) == pytest.approx(reliability, abs=1e-9)


@pytest.mark.parametrize("reliability", [0.6, 0.75, 0.9])
def test_rankings_order_pairs_as_often_as_stated(reliability: float) -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=4) for _ in range(4000)]
    annotator = Annotator("a", noise_scale_for(reliability, pair_differences(groups)))
    right = []
    for group in groups:
        perceived = annotator.perceive(group, TEXTS, rng)
        right += [(perceived[i] > perceived[j]) == (group[i] > group[j]) for i in range(4) for j in range(i)]
    # 24,000 pairs, 6 of each prompt correlated: the standard error stays below 0.005.
    assert np.mean(right) == pytest.approx(reliability, abs=0.015)


def test_the_ends_of_the_scale() -> None:
    differences = pair_differences(GROUPS)
    assert noise_scale_for(1.0, differences) == 0
    assert mean_reliability(differences, 0.0) == 1
    assert mean_reliability(differences, noise_scale_for(0.5, differences)) == pytest.approx(0.5, abs=1e-5)


def test_rankings_follow_plackett_luce() -> None:
    utilities, scale, draws = np.array([0.0, 0.6, 1.5]), 0.8, 20_000
    annotator, rng = Annotator("a", scale), np.random.default_rng(1)
    seen = [tuple(np.argsort(-annotator.perceive(utilities, TEXTS[:3], rng))) for _ in range(draws)]
    for order in permutations(range(3)):
        strengths = np.exp(utilities[list(order)] / scale)
        expected = np.prod([strengths[k] / strengths[k:].sum() for k in range(3)])
        assert seen.count(order) / draws == pytest.approx(expected, abs=0.012)


def test_equal_texts_are_seen_as_equal() -> None:
    perceived = Annotator("a", 5.0).perceive(np.array([1.0, 1.0, 1.0]), ("x", "y", "x"), np.random.default_rng(0))
    assert perceived[0] == perceived[2] != perceived[1]


def test_pairs_of_equal_utility_have_no_order() -> None:
    assert sorted(pair_differences([np.array([1.0, 1.0, 3.0]), np.array([0.0, 0.5])])) == [0.5, 2.0, 2.0]


def test_ties_do_not_run_along_a_chain() -> None:
    assert ranks_of(np.array([0.0, 0.9, 1.8, 3.5]), 1.0) == (3, 2, 2, 1)
    assert ranks_of(np.array([2.0, 1.0, 3.0]), 0.0) == (2, 3, 1)
    assert ranks_of(np.array([1.0, 1.0, 0.0]), 0.0) == (1, 1, 2)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(0, 5))
def test_ranks_agree_with_what_is_perceived(perceived: list[float], margin: float) -> None:
    ranks = ranks_of(np.array(perceived), margin)
    assert sorted(set(ranks)) == list(range(1, len(set(ranks)) + 1))
    for i, a in enumerate(perceived):
        for j, b in enumerate(perceived):
            if ranks[i] < ranks[j]:
                assert a > b
            elif ranks[i] == ranks[j]:
                assert abs(a - b) <= margin
