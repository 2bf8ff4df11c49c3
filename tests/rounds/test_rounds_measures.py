"""What a round measures: paired accuracies, whether active choice paid, the audit's verdict."""

import numpy as np
import pytest

from rlhf.feedback.judgments import CompletionShown, Judgment
from rlhf.rounds.measures import audited, compare_models, orders_alike, worth_of_active


def judgment(number, ranks, source="random", texts=None):
    texts = texts or [f"{number}-{place}" for place in range(len(ranks))]
    return Judgment(
        judgment_id=f"j{number}",
        task_id=f"t{number}",
        prompt=f"prompt {number}",
        completions=tuple(map(CompletionShown, texts)),
        ranks=ranks,
        annotator="somebody",
        source=source,
    )


def test_scores_that_order_as_the_judge_does():
    assert orders_alike((1, 2, 3), [3.0, 2.0, 1.0]) == 1
    assert orders_alike((1, 2, 3), [1.0, 2.0, 3.0]) == 0
    assert orders_alike((1, 1, 2), [0.0, 9.0, 1.0]) == 0.5  # the tie says nothing
    assert orders_alike((1, 2), [1.0, 1.0]) == 0.5
    assert orders_alike((1, 1), [1.0, 2.0]) is None


def test_a_better_model_is_promoted_and_a_worse_one_is_not():
    judged = [judgment(number, (1, 2)) for number in range(20)]
    right, wrong = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    half = [right, wrong] * 10
    better = compare_models(judged, half, [right] * 20, 0.0)
    assert better["promoted"]
    assert better["accuracy_gain"] == pytest.approx(0.5)
    low, high = better["accuracy_gain_interval"]
    assert 0.25 < low < 0.5 < high < 0.75
    worse = compare_models(judged, [right] * 20, half, 0.0)
    assert not worse["promoted"]
    assert compare_models(judged, [right] * 20, half, 0.5)["promoted"]
    assert compare_models(judged, half, half, 0.0)["promoted"]


def test_nothing_is_promoted_that_nobody_judged():
    assert not compare_models([], [], [], 1.0)["promoted"]
    ties = [judgment(1, (1, 1))]
    assert not compare_models(ties, [np.zeros(2)], [np.zeros(2)], 1.0)["promoted"]


def test_judgments_of_one_prompt_count_once():
    judged = [judgment(1, (1, 2))] * 9 + [judgment(2, (1, 2))]
    right, wrong = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    found = compare_models(judged, [wrong] * 10, [right] * 9 + [wrong], 0.0)
    assert found["accuracy_gain"] == pytest.approx(0.5)
    assert found["heldout_prompts"] == 2


TASTE = np.array([1.0, 1.0])
KNOWN = np.array([1.0, 0.0])


def labelled(numbers, source, features, spread, rng, liked=TASTE):
    """Judgments of two completions whose features differ by `spread` along each direction."""
    found = []
    for number in numbers:
        pair = [(f"prompt {number}", f"{number}-{place}") for place in range(2)]
        features |= {place: rng.normal(size=2) * spread for place in pair}
        first, second = (features[place] @ liked for place in pair)
        found.append(judgment(number, (1, 2) if first > second else (2, 1), source))
    return found


def test_active_choice_pays_where_it_teaches_what_the_head_does_not_know():
    """The head in service knows the first direction of the taste and not the second."""
    rng, head, features = np.random.default_rng(0), np.array([1.0, 0.0]), {}
    heldout = [
        one
        for number in range(60)  # of all but one in six the head knows everything
        for one in labelled([number], "random", features, np.array([0.2, 1.0]) if number % 12 < 2 else KNOWN, rng)
    ]
    telling = labelled(range(100, 130), "active", features, np.array([0.2, 1.0]), rng)
    known = labelled(range(200, 230), "active", features, KNOWN, rng)
    wrong = labelled(range(300, 330), "active", features, np.array([1.0, 1.0]), rng, liked=-TASTE)
    gains = [worth_of_active(active, heldout, features, head) for active in (telling, known, wrong)]
    assert gains[0].value > gains[1].value > gains[2].value
    assert gains[0].value > 0 > gains[2].value
    assert gains[0].count == 60


def test_too_few_judgments_say_nothing_of_active_choice():
    assert worth_of_active([], [judgment(1, (1, 2))], {}, np.zeros(2)) is None


def test_an_audit_counts_wins_and_ties():
    judged = [judgment(n, ranks, "audit") for n, ranks in enumerate([(1, 2)] * 6 + [(1, 1)] * 2 + [(2, 1)] * 2)]
    found = audited(judged, 2, [0.5] * 12)
    assert found["pairs"] == 12
    assert found["win_rate"] == pytest.approx((6 + 1 + 1) / 12)
    assert not found["over_optimised"]


@pytest.mark.parametrize(("wins", "reward", "expected"), [(2, 1.0, True), (2, -1.0, False), (13, 1.0, False)])
def test_reward_up_while_the_judges_like_it_less(wins, reward, expected):
    judged = [judgment(n, (1, 2) if n < wins else (2, 1), "audit") for n in range(30)]
    assert audited(judged, 0, [reward] * 30)["over_optimised"] is expected


def test_no_audit_without_pairs():
    assert audited([], 0, []) == {"pairs": 0, "over_optimised": False}
