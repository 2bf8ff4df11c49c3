"""Best-of-n against enumeration, its KL against the bound, fits against planted curves, intervals against the truth."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from rlhf.errors import DataError
from rlhf.evaluate.results import Fit, Form
from rlhf.evaluate.scaling import (
    Resamples,
    best_of_n_kl_bound,
    best_of_n_means,
    fit,
    gain_at,
    least_squares,
    optimum,
    percentile_interval,
)

Floats = NDArray[np.float64]
FORMS: tuple[Form, ...] = ("best_of_n", "rl")
PLANTED = {"best_of_n": (0.30, 0.08), "rl": (0.25, 0.15)}
DISTANCES = np.array([0.3, 0.6, 0.9, 1.3, 1.7, 2.1, 2.5, 3.0])


def best_value(scores: Floats, values: Floats, chosen: tuple[int, ...]) -> float:
    """Value of the best-scored among the chosen; of several best ones, their mean."""
    best = max(scores[list(chosen)])
    return float(np.mean([values[i] for i in chosen if scores[i] == best]))


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_every_subset(ties: bool) -> None:
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    if ties:
        scores = np.round(scores)
    found = best_of_n_means(scores, values, [1, 2, 3, 6])
    for i, n in enumerate([1, 2, 3, 6]):
        for p in range(3):
            subsets = [best_value(scores[p], values[p], chosen) for chosen in combinations(range(6), n)]
            assert found[i, p] == pytest.approx(np.mean(subsets)), (n, p)
    assert best_of_n_means(scores, scores, [6])[0] == pytest.approx(scores.max(1))


def test_best_of_n_is_unbiased() -> None:
    """Its expectation over every possible draw of 4 samples from a world of 3 completions is the true best-of-n."""
    p, scores, values = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.0]), np.array([0.3, -1.0, 2.0])
    draws = list(product(range(3), repeat=4))
    chances = np.array([p[list(draw)].prod() for draw in draws])
    indices = np.array(draws)
    for n in (1, 2, 3, 4):
        expectation = chances @ best_of_n_means(scores[indices], values[indices], [n])[0]
        truth = sum(p[list(t)].prod() * best_value(scores, values, t) for t in product(range(3), repeat=n))
        assert expectation == pytest.approx(truth), n


def test_many_samples_do_not_overflow() -> None:
    scores = np.arange(4096.0)[None]
    found = best_of_n_means(scores, scores, [1, 2, 4096])[:, 0]
    # The mean of the largest of n of the numbers 0 … N - 1 is n (N + 1) / (n + 1) - 1.
    assert found == pytest.approx([2047.5, 2 * 4097 / 3 - 1, 4095.0])


def test_what_best_of_n_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 3"):
        best_of_n_means(np.zeros((2, 3)), np.zeros((2, 3)), [4])
    with pytest.raises(ValueError, match="shape"):
        best_of_n_means(np.zeros((2, 3)), np.zeros((3, 3)), [1])


def best_of_n_distribution(p: Floats, scores: Floats, n: int) -> Floats:
    """By every n-tuple of draws. Scores differ."""
    chosen = np.zeros(len(p))
    for draw in product(range(len(p)), repeat=n):
        chosen[max(draw, key=lambda i: scores[i])] += p[list(draw)].prod()
    return chosen


def kl(p: Floats, q: Floats) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("p", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.1, 0.8]])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_bound_holds_in_an_enumerated_world(p: list[float], n: int) -> None:
    chances, scores = np.array(p), np.array([0.4, -1.0, 2.0, 0.9])
    exact = kl(best_of_n_distribution(chances, scores, n), chances)
    assert exact <= best_of_n_kl_bound(n) + 1e-12
    assert exact <= -math.log(chances[scores.argmax()]) + 1e-12
    if n > 1:
        assert exact < 0.97 * best_of_n_kl_bound(n), "with four completions it is loose"
    else:
        assert exact == best_of_n_kl_bound(1) == 0


def test_the_bound_is_reached_where_no_two_completions_are_alike() -> None:
    """Among many equally likely completions: P(best of n is the i-th) = (i/C)^n - ((i-1)/C)^n."""
    few = np.arange(5) / 4
    assert np.diff(few**3) == pytest.approx(best_of_n_distribution(np.full(4, 0.25), np.arange(4.0), 3))
    edges = np.arange(20_001) / 20_000
    for n in (2, 4, 64):
        exact = kl(np.diff(edges**n), np.full(20_000, 1 / 20_000))
        assert best_of_n_kl_bound(n) - 2e-3 < exact <= best_of_n_kl_bound(n), n


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_curve_is_recovered(form: Form) -> None:
    alpha, beta = PLANTED[form]
    found = least_squares(form, DISTANCES, gain_at(form, DISTANCES, alpha, beta))
    assert found == pytest.approx((alpha, beta))
    assert gain_at(form, 0.0, alpha, beta) == 0


@pytest.mark.parametrize("form", FORMS)
def test_least_squares_is_the_textbooks(form: Form) -> None:
    """Also of many at once."""
    gains = np.random.default_rng(0).normal(size=(5, len(DISTANCES)))
    second = -(DISTANCES**2) if form == "best_of_n" else -DISTANCES * np.log(DISTANCES)
    expected = np.linalg.lstsq(np.stack([DISTANCES, second], 1), gains.T, rcond=None)[0]
    assert np.stack(least_squares(form, DISTANCES, gains)) == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_optimum_is_the_largest_value_on_a_fine_grid(form: Form) -> None:
    grid = np.linspace(0, 10, 100_001)
    values = gain_at(form, grid, *PLANTED[form])
    d, gain = optimum(form, *PLANTED[form])
    assert d == pytest.approx(grid[values.argmax()], abs=1e-4)
    assert gain == pytest.approx(values.max())


def test_curves_without_a_peak_have_none() -> None:
    for form in FORMS:
        d, gain = optimum(form, [0.3, 0.3], [0.0, -0.1])
        assert np.isinf(d).all()
        assert np.isinf(gain).all()
    assert optimum("rl", 1.0, 1e-9)[0] == np.inf, "so far away that no number holds it"
    assert [float(found) for found in optimum("best_of_n", -0.1, 0.1)] == [0, 0], "the judge dislikes any step"


def planted(form: Form, prompts: int, seed: int) -> Fit:
    """A curve whose prompts differ in how far they go and in what they gain."""
    rng = np.random.default_rng(seed)
    means = gain_at(form, DISTANCES, *PLANTED[form])[:, None]
    noise = 0.15 * rng.normal(size=prompts) + 0.2 * rng.normal(size=(len(DISTANCES), prompts))
    distances = np.broadcast_to(DISTANCES[:, None] ** 2, noise.shape)
    if form == "rl":
        distances = distances * rng.gamma(4.0, 1 / 4.0, size=noise.shape)
    return fit(form, distances, means + noise, Resamples.draw(prompts, seed, count=400))


@pytest.mark.parametrize("form", FORMS)
def test_intervals_cover_what_was_planted(form: Form) -> None:
    alpha, beta = PLANTED[form]
    best_d, best_gain = optimum(form, alpha, beta)
    fits = [planted(form, prompts=150, seed=seed) for seed in range(150)]
    truths = {"alpha": alpha, "beta": beta, "optimum_d": float(best_d), "optimum_gain": float(best_gain)}
    for name, truth in truths.items():
        ends = [getattr(one, f"{name}_interval") for one in fits]
        covered = np.mean([low <= truth <= (math.inf if high is None else high) for low, high in ends])
        # 150 trials of probability 0.95: standard deviation 0.018.
        assert 0.89 <= covered <= 1, (name, covered)
        assert np.mean([low < (math.inf if high is None else high) for low, high in ends]) == 1
    assert np.mean([one.alpha for one in fits]) == pytest.approx(alpha, abs=0.01)


def test_a_fit_draws_itself_and_says_how_sure_the_turn_is() -> None:
    found = planted("best_of_n", prompts=2000, seed=0)
    assert found.points == len(DISTANCES)
    assert found.farthest_d == pytest.approx(3.0)
    assert found.optimum_d == pytest.approx(0.30 / 0.16, abs=0.1)
    assert found.optimum_share == 1
    assert found.misfit < 0.02
    d, gain, low, high = np.array(found.curve).T
    assert (d[0], d[-1], gain[0]) == (0, pytest.approx(3.0), 0)
    assert (low <= gain).all()
    assert (gain <= high).all()
    rising = fit("best_of_n", DISTANCES[:, None] ** 2, DISTANCES[:, None], Resamples.draw(1, 0))
    assert rising.optimum_share == 0


def test_a_peak_that_no_measurement_speaks_of_is_none() -> None:
    almost_straight = 0.3 * DISTANCES - 1e-4 * DISTANCES * np.log(DISTANCES)
    found = fit("rl", DISTANCES[:, None] ** 2, almost_straight[:, None], Resamples.draw(1, 0))
    assert found.beta == pytest.approx(1e-4)
    assert (found.optimum_d, found.optimum_gain, found.optimum_d_interval) == (None, None, (None, None))


def test_another_form_shows_in_the_misfit() -> None:
    straight_then_flat = np.minimum(DISTANCES, 1.0)[:, None]
    found = fit("best_of_n", DISTANCES[:, None] ** 2, straight_then_flat, Resamples.draw(1, 0))
    assert found.misfit > 0.05


def test_too_few_points_are_refused_and_those_that_did_not_move_do_not_count() -> None:
    distances = np.array([0.0, 0.0, 0.5, 1.0, 2.0])[:, None]
    with pytest.raises(DataError, match=r"^points away from the initial policy: 3, too few .* 4 are needed"):
        fit("rl", distances**2, distances, Resamples.draw(1, 0))
    moved = np.array([0.0, 0.5, 1.0, 1.5, 2.0])[:, None]
    assert fit("rl", moved**2, moved, Resamples.draw(1, 0)).points == 4


def test_points_at_one_distance_are_refused() -> None:
    distances = np.array([1.0, 1.1, 1.2, 1.3])[:, None]
    with pytest.raises(DataError, match=r"between √KL 1 and 1\.3, too close together"):
        fit("rl", distances**2, distances, Resamples.draw(1, 0))


def test_intervals_with_infinite_ends_are_json() -> None:
    assert percentile_interval(np.array([1.0] * 50 + [np.inf] * 50)) == (1.0, None)
    assert percentile_interval(np.full(10, np.inf)) == (None, None)
    low, high = percentile_interval(np.arange(1001.0))
    assert (low, high) == (pytest.approx(25, abs=1), pytest.approx(975, abs=1))


def test_resamples_take_all_points_of_a_prompt_together() -> None:
    values = np.random.default_rng(0).normal(size=(2, 40))
    means = Resamples.draw(40, seed=1, count=50).means(np.stack([values[0], 2 * values[0], values[1]]))
    assert means.shape == (50, 3)
    assert means[:, 1] == pytest.approx(2 * means[:, 0])
    assert np.corrcoef(means[:, 0], means[:, 2])[0, 1] < 0.9
