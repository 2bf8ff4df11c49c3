from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf.preference.calibration import (
    accuracy,
    calibration_figures,
    expected_calibration_error,
    length_only_accuracy,
    mean_nll,
    reliability,
)


def test_equal_scores_are_half_right() -> None:
    assert accuracy(np.array([1.0, -0.1, 0.0, 3.0])) == 0.625


def test_nll_of_indifference_is_log_2_and_of_huge_margins_finite() -> None:
    assert mean_nll(np.zeros(3)) == pytest.approx(math.log(2))
    assert mean_nll(np.array([-1e6])) == 1e6


def test_true_probabilities_are_calibrated_and_exaggerated_ones_are_not() -> None:
    generator = np.random.default_rng(0)
    differences = generator.normal(0, 1.5, 40000)
    first_wins = generator.random(40000) < 1 / (1 + np.exp(-differences))
    margins = np.where(first_wins, differences, -differences)
    assert expected_calibration_error(reliability(margins)) < 0.01
    assert expected_calibration_error(reliability(3 * margins)) > 0.08


def test_bins_hold_every_pair_in_both_orders() -> None:
    bins = reliability(np.array([math.log(3), -math.log(3), 100.0]))
    assert [(b.lower, b.pairs) for b in bins] == [(0.0, 1), (0.2, 2), (0.7, 2), (0.9, 1)]
    assert [b.observed for b in bins] == [0.0, 0.5, 0.5, 1.0]
    assert bins[1].predicted == pytest.approx(0.25)
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.25 + 2 * 0.25) / 6)
    assert calibration_figures(np.array([0.0]))["calibration"][0]["pairs"] == 2


def test_length_baseline_learns_its_sign_and_its_feature_from_the_training_pairs() -> None:
    train = {"words": np.array([-1.0, -2.0, -1.0, 1.0]), "tokens": np.array([1.0, -1.0, 1.0, -1.0])}
    heldout = {"words": np.array([-1.0, -1.0, 2.0, 0.0]), "tokens": np.array([1.0, 1.0, 1.0, 1.0])}
    assert length_only_accuracy(train, heldout) == (0.625, "fewer words")
