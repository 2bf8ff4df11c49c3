"""Every invariant as a pure function: silent on what a healthy run showed, and named where it is violated."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf.ppo.agreement import Agreement, agreement, cause, logprob_bound
from rlhf.ppo.invariants import CHECKS, REMEDIES, History, Published, Rules, Step, Watched, diagnose
from rlhf.ppo.settings import MonitorSettings
from support.rollouts import version

BOUND = 1e-3
RULES = Rules(MonitorSettings(), BOUND, vocab_size=512, recomputes=True)
CLOSE = Agreement("the policy", mean=1e-6, above=6e-6, below=5e-6)
FAR = Agreement("the policy", mean=0.2, above=0.9, below=0.8)
DEMO = (
    # score mean, standard deviation, KL, entropy, explained variance, clip fraction, norms, tokens, ended, bigrams
    (0.087, 0.98, 1.5e-7, 1.05, -2.10, 0.126, 0.33, 5.25, 20.6, 0.94, 0.59),
    (0.216, 0.98, 0.10, 1.10, -0.64, 0.052, 0.38, 4.31, 22.5, 0.92, 0.58),
    (0.14, 0.96, 0.93, 1.04, -0.51, 0.042, 0.43, 2.57, 23.1, 0.92, 0.58),
    (0.14, 1.00, 1.44, 1.00, 0.09, 0.046, 0.48, 1.68, 21.0, 0.98, 0.57),
    (0.55, 1.02, 1.51, 0.97, 0.22, 0.049, 0.49, 2.48, 20.6, 0.97, 0.57),
    (0.56, 1.05, 2.41, 0.95, 0.12, 0.043, 0.50, 1.09, 20.2, 0.98, 0.56),
    (0.66, 1.01, 3.03, 0.93, 0.26, 0.041, 0.55, 0.67, 17.6, 1.00, 0.55),
    (0.85, 0.98, 3.58, 0.91, 0.34, 0.040, 0.53, 0.58, 18.7, 0.97, 0.54),
    (1.04, 0.95, 3.78, 0.90, 0.38, 0.043, 0.54, 0.73, 17.8, 1.00, 0.53),
    (0.97, 0.95, 4.11, 0.88, 0.38, 0.046, 0.57, 0.29, 18.9, 0.98, 0.52),
    (1.28, 0.90, 4.52, 0.86, 0.18, 0.030, 0.52, 0.59, 19.2, 1.00, 0.52),
    (1.18, 0.92, 4.03, 0.86, 0.43, 0.028, 0.49, 0.29, 18.3, 0.98, 0.52),
    (1.27, 0.90, 4.32, 0.85, 0.28, 0.029, 0.53, 0.26, 17.6, 0.98, 0.51),
    (1.22, 0.92, 4.41, 0.84, 0.41, 0.026, 0.53, 0.45, 17.6, 0.98, 0.51),
    (1.33, 0.89, 4.80, 0.83, 0.48, 0.024, 0.70, 0.52, 18.2, 0.98, 0.50),
    (1.31, 0.88, 4.32, 0.82, 0.43, 0.026, 0.46, 0.31, 19.3, 0.98, 0.48),
    (1.52, 0.85, 5.01, 0.81, 0.48, 0.024, 0.50, 0.35, 21.4, 0.97, 0.47),
    (1.31, 0.90, 4.38, 0.80, 0.50, 0.022, 0.55, 0.62, 18.4, 0.98, 0.47),
    (1.44, 0.86, 4.53, 0.79, 0.45, 0.021, 0.57, 0.55, 18.3, 0.98, 0.46),
    (1.57, 0.83, 5.15, 0.78, 0.52, 0.023, 0.47, 0.46, 19.4, 1.00, 0.45),
    (1.79, 0.77, 5.34, 0.77, 0.62, 0.025, 0.44, 1.00, 18.7, 0.98, 0.45),
    (1.56, 0.82, 5.77, 0.76, 0.51, 0.024, 0.51, 1.27, 19.7, 1.00, 0.46),
)
"""The first steps of the demo, rounded; bigrams about as its sample tables have them."""
NAMES = (
    *("score_mean", "score_std", "kl_mean", "entropy", "explained_variance", "clip_fraction", "policy_grad_norm"),
    *("critic_grad_norm", "response_tokens_mean", "ended_fraction", "distinct_bigrams"),
)
ROWS = [
    dict(zip(NAMES, row, strict=True))
    | {"first_ratio_error": 0.0, "staleness_mean": 0.0, "kl_standard_error": 0.05 + 0.1 * row[2]}
    for row in DEMO
]
STEPS = len(ROWS)
HEALTHY = Watched(
    policies=[CLOSE, replace(CLOSE, of="policy-0")],
    reference=CLOSE,
    texts=16,
    tokens=1300,
    publishes=[Published(version(0), {"policy-0": version(0), "policy-1": version(0)})],
)


def step(number=STEPS, rows=ROWS, watched=HEALTHY, rules=RULES, **figures):
    """A step of the demo, its figures changed."""
    window = rules.settings.window
    before = rows[: number - 1]
    return Step(number, rows[number - 1] | figures, watched, History(before[:window], before[-window:]), rules)


def names(found):
    return [diagnosis.name for diagnosis in diagnose(found)]


def later(number=STEPS, last=5, **figures):
    """The demo, with other figures in its last steps."""
    rows = [row | (figures if n > number - last else {}) for n, row in enumerate(ROWS[:number], start=1)]
    return step(number, rows)


@pytest.mark.parametrize("number", range(1, len(ROWS) + 1))
def test_a_healthy_run_is_met_with_silence(number):
    assert diagnose(step(number)) == []


def test_every_diagnosis_has_a_setting_a_remedy_and_a_check():
    actions = {name for name, field in MonitorSettings.model_fields.items() if field.default in ("warn", "stop", "off")}
    assert CHECKS.keys() == REMEDIES.keys() == actions


VIOLATIONS = {
    "first_ratio": step(first_ratio_error=1e-6),
    "start_kl": step(1, watched=replace(HEALTHY, reference=FAR)),
    "policy_logprobs": step(watched=replace(HEALTHY, policies=[CLOSE, FAR])),
    "sampling": step(watched=replace(HEALTHY, other_sampling=["temperature 0.7 in place of 1"])),
    "tokenizer": step(watched=replace(HEALTHY, other_texts=3)),
    "padding": step(watched=replace(HEALTHY, tokens_after_end=40)),
    "replica_weights": step(watched=replace(HEALTHY, publishes=[Published(version(5), {"policy-1": version(4)})])),
    "entropy": step(entropy=-0.2),
    "negative_kl": step(kl_mean=-1.0, kl_standard_error=0.1),
    "explained_variance": later(explained_variance=-0.4),
    "clip_fraction": later(clip_fraction=0.45),
    "gradient": step(policy_grad_norm=6.0),
    "length": later(response_tokens_mean=47.0),
    "ngrams": later(distinct_bigrams=0.2),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_violation_is_named_alone_and_with_numbers(name):
    (found,) = diagnose(VIOLATIONS[name])
    assert found.name == name
    assert any(character.isdigit() for character in found.what)
    assert str(found) == f"{name}: {found.what}. {REMEDIES[name]}"


@pytest.mark.parametrize("name", CHECKS)
def test_each_can_be_turned_off_or_made_to_stop(name):
    violated = VIOLATIONS[name]

    def as_set(action):
        settings = violated.rules.settings.model_copy(update={name: action})
        return diagnose(replace(violated, rules=replace(violated.rules, settings=settings)))

    assert as_set("off") == []
    assert [found.severity for found in as_set("stop")] == ["stop"]
    assert [found.severity for found in as_set("warn")] == ["warn"]


def test_the_first_ratio_has_room_for_rounding_only_where_another_computed_it():
    service = replace(RULES, recomputes=False)
    assert names(step(rules=service, first_ratio_error=0.5 * BOUND)) == []
    assert names(step(rules=service, first_ratio_error=2 * BOUND)) == ["first_ratio"]
    assert names(step(rules=service, first_ratio_error=0.3, staleness_mean=0.5)) == [], "stale rollouts may differ"


def test_policy_and_reference_may_differ_once_the_policy_has_learned():
    assert names(step(2, watched=replace(HEALTHY, reference=FAR))) == []


def test_a_bound_holds_for_the_largest_and_a_tenth_of_it_for_the_mean():
    given = np.zeros(1000, np.float32)
    assert agreement("x", given, given + 0.9e-4).within(BOUND)
    assert not agreement("x", given, given + 2e-4).within(BOUND), "small everywhere is no rounding"
    given[0] = 0.9e-3
    assert agreement("x", given, np.zeros(1000)).within(BOUND)
    given[0] = 1.1e-3
    assert not agreement("x", given, np.zeros(1000)).within(BOUND)
    given[0] = np.nan
    assert not agreement("x", given, np.zeros(1000)).within(BOUND)


def test_the_coarsest_dtype_decides_unless_a_bound_is_given():
    assert logprob_bound(["float32", "float32"]) == 1e-3
    assert logprob_bound(["float32", "bfloat16"]) == logprob_bound(["bfloat16", "float16"]) > 1e-3
    assert logprob_bound(["bfloat16"], 0.25) == 0.25


def test_a_difference_is_told_by_its_looks():
    raw, expected = np.array([-1.0, -2.0, -3.0]), np.array([-0.5, -2.5, -4.0])
    assert "temperature was forgotten" in cause(agreement("x", raw, expected, raw), BOUND)
    assert "top-p" in cause(agreement("x", expected + np.array([0.0, 0.1, 0.3]), expected, raw), BOUND)
    assert "other weights" in cause(agreement("x", expected + np.array([0.1, -0.1, 0.3]), expected, raw), BOUND)
    assert "other weights" in cause(agreement("x", expected + np.array([0.0, 0.1, 5.0]), expected, raw), BOUND)
    assert "not finite" in cause(agreement("x", np.array([-1, -2, np.nan]), expected, raw), BOUND)


def test_entropy_has_an_upper_end_too():
    assert names(step(entropy=math.log(512))) == []
    (found,) = diagnose(step(entropy=7.0))
    assert found.name == "entropy"
    assert "512 tokens allow 6.24" in found.what


def test_chance_and_old_rollouts_may_make_the_kl_negative():
    assert names(step(kl_mean=-0.4, kl_standard_error=0.1)) == []
    assert names(step(kl_mean=-1.0, kl_standard_error=0.1, staleness_mean=0.5)) == []
    assert names(step(kl_mean=-1.0, kl_standard_error=None)) == [], "one completion has no spread"


def test_the_critic_has_time_to_warm_up_and_may_be_missing():
    assert names(later(19, explained_variance=-2.0)) == []
    assert names(later(20, explained_variance=-2.0)) == ["explained_variance"]
    assert names(later(20, explained_variance=None, critic_grad_norm=None)) == []
    assert names(later(last=2, explained_variance=-2.0)) == [], "two bad steps are noise"


def test_one_step_that_clips_much_is_no_news():
    assert names(later(last=2, clip_fraction=0.9)) == []


def test_a_gradient_that_stays_zero():
    (found,) = diagnose(later(last=6, policy_grad_norm=0.0))
    assert found.name == "gradient"
    assert "nothing is learned" in found.what
    assert names(later(last=5, policy_grad_norm=0.0)) == [], "a batch of equal rewards can happen"
    warming = replace(RULES, policy_learns_from=len(ROWS) + 1)
    assert diagnose(replace(later(last=6, policy_grad_norm=0.0), rules=warming)) == [], "the critic learns first"
    (found,) = diagnose(step(critic_grad_norm=40.0))
    assert found.what.startswith("the critic's gradient has norm 40, after 0.55 before")


def test_completions_that_stop_ending_while_the_score_rises():
    (found,) = diagnose(later(ended_fraction=0.3))
    assert found.name == "length"
    assert found.what.startswith("the score rose from 0.23 to 1.5, and the share that ends by itself fell from 0.946")
    assert names(later(ended_fraction=0.3, score_mean=0.3)) == [], "nothing rewards it"
    assert names(later(response_tokens_mean=47.0, score_mean=0.3)) == []


def test_distinct_pairs_may_not_vanish_whatever_the_score_does():
    (found,) = diagnose(later(distinct_bigrams=0.2, score_mean=0.3))
    assert found.what == ("the score stayed at 0.3, and distinct token pairs fell from 58% to 20% of all, 29% at least")


def test_nothing_is_compared_with_the_start_before_there_are_two_windows():
    assert names(later(9, response_tokens_mean=90.0, score_mean=9.0)) == []
    assert names(later(10, response_tokens_mean=90.0, score_mean=9.0)) == ["length"]
