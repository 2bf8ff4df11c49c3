"""The noise of simulated annotators: reliability as stated, Plackett-Luce rankings, ties within the margin."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.preference.annotators import Annotator, Shown, mean_reliability, noise_scale_for, pair_differences, ranks_of

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


def sees(
    kind: str, shared: list[float], order: tuple[int, ...] = (0, 1, 2, 3), noise: float = 0.0, **more: object
) -> list[int]:
    """Indices, best first."""
    texts = more.pop("texts", TEXTS)
    annotator = Annotator("a", noise, kind, **more)  # type: ignore[arg-type]
    shown = Shown(np.array(shared), texts, order, np.array([0.0, 3.0, 1.0, 2.0]))  # type: ignore[arg-type]
    return np.argsort(-annotator.sees(shown, np.random.default_rng(0)), kind="stable").tolist()


def test_kinds_without_noise() -> None:
    shared = [3.0, 2.0, 1.0, 0.0]
    assert sees("honest", shared) == sees("hasty", shared) == [0, 1, 2, 3]
    assert sees("adversarial", shared) == [3, 2, 1, 0]
    assert sees("minority", shared) == [1, 3, 2, 0]
    assert sees("position", shared, (3, 2, 1, 0), typical=30.0) == [3, 2, 1, 0]
    assert sees("position", shared, (3, 2, 1, 0), typical=0.1) == [0, 1, 2, 3]
    # What was shown in the second half stays there, as shown.
    assert sees("lazy", shared, (3, 1, 2, 0)) == [1, 3, 2, 0]
    assert sees("targeted", shared, texts=("a", "b", "c buy", "d"), trigger="buy") == [2, 0, 1, 3]


def test_random_clicker_knows_nothing_of_the_utility() -> None:
    annotator, rng = Annotator("a", 0.0, "random"), np.random.default_rng(0)
    shown = Shown(np.array([9.0, 0.0, 0.0, 0.0]), TEXTS, (0, 1, 2, 3))
    firsts = [int(annotator.sees(shown, rng).argmax()) for _ in range(2000)]
    assert np.bincount(firsts, minlength=4) / 2000 == pytest.approx([0.25] * 4, abs=0.04)


def test_hasty_errs_more_where_utilities_are_close() -> None:
    annotator, rng = Annotator("a", 0.5, "hasty", typical=1.0), np.random.default_rng(0)

    def errors(gap: float) -> float:
        shown = Shown(np.array([gap, 0.0]), ("a", "b"), (0, 1))
        return float(np.mean([np.diff(annotator.sees(shown, rng))[0] > 0 for _ in range(2000)]))

    honest = 1 / (1 + np.exp(0.5 / 0.5))
    assert errors(0.5) == pytest.approx(1 / (1 + np.exp(0.5)), abs=0.04)
    assert errors(0.5) > honest + 0.05
    assert errors(2.0) < 0.01
