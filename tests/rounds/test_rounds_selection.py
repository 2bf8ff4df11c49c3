"""Which prompts a round asks about: BALD, known probabilities, rounds spread over PPO."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.prompts import Prompt
from rlhf.feedback.settings import FeedbackSettings
from rlhf.rounds.plan import plan, step_of
from rlhf.rounds.selection import bald, choose, inclusion, systematic


def entropy(p):
    return -sum(q * np.log(q) for q in (p, 1 - p) if q > 0)


def test_bald_is_the_information_about_the_member():
    # Two members that are sure of the opposite: the answer says which is right, one bit.
    opposite = np.array([[9.0, -9.0], [-9.0, 9.0]], dtype=np.float32)
    assert bald([opposite], 10.0)[0] == pytest.approx(np.log(2), abs=1e-6)
    # All in doubt alike: an answer tells nothing, though it is as open as can be.
    assert bald([np.zeros((2, 2), np.float32)], 1.0)[0] == pytest.approx(0)
    # All sure alike, though their logits differ.
    assert bald([np.array([[30.0, 90.0], [0.0, 0.0]], np.float32)], 1.0)[0] < 1e-9
    scores = np.array([[0.5, -0.2, 1.0], [0.1, 0.4, 0.0]], dtype=np.float32)
    p = 1 / (1 + np.exp(-2.0 * (scores[0] - scores[1]).astype(np.float64)))
    by_hand = entropy(p.mean()) - np.mean([entropy(q) for q in p])
    assert bald([scores], 2.0)[0] == pytest.approx(by_hand)


def test_one_member_has_nothing_to_disagree_about():
    assert bald([np.array([[1.0], [0.0], [3.0]], np.float32)], 1.0)[0] == pytest.approx(0, abs=1e-12)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=40), st.data())
def test_probabilities_of_inclusion_add_up_and_none_is_above_one(worth, data):
    count = data.draw(st.integers(0, len(worth)))
    shares = inclusion(np.array(worth), count)
    assert shares.sum() == pytest.approx(count)
    assert (shares <= 1 + 1e-12).all()
    assert (shares > 0).all() or not count
    drawn = systematic(shares, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == len(drawn) == count


def test_what_is_drawn_comes_as_often_as_its_probability_says():
    shares = inclusion(np.array([0.1, 0.4, 2.0, 0.5, 1.0, 0.0]), 3)
    rng = np.random.default_rng(3)
    counts = np.zeros(6)
    for _ in range(4000):
        counts[systematic(shares, rng)] += 1
    assert np.abs(counts / 4000 - shares).max() < 0.03


def test_a_share_is_held_out_and_the_rest_by_worth():
    worth = np.concatenate([np.zeros(80), np.ones(20)])
    chosen = choose(worth, 100, 20, 0.3, seed=1)
    heldout, others = ([one for one in chosen if one.heldout is flag] for flag in (True, False))
    assert len(heldout) == 6
    assert {one.source for one in heldout} == {"random"}
    assert {one.p_select for one in heldout} == {0.06}
    assert len(others) == 14
    assert {one.source for one in others} == {"active"}
    assert sum(one.index >= 80 for one in others) >= 13
    assert len({one.index for one in chosen}) == 20
    assert all(0 < one.p_select <= 1 for one in chosen)


def test_without_worth_everything_is_random():
    chosen = choose(None, 50, 20, 0.3, seed=1)
    assert {one.source for one in chosen} == {"random"}
    assert sum(one.heldout for one in chosen) == 6
    assert choose(None, 0, 20, 0.3, seed=1) == []


def test_rounds_are_spread_evenly():
    assert step_of(1, 1, 39) == 13
    assert [step_of(n, 3, 70) for n in (1, 2, 3)] == [10, 30, 50]


def test_rounds_ask_about_other_prompts_and_audit_the_same():
    prompts = [Prompt(str(number), None, {}) for number in range(100)]
    its = FeedbackSettings(rounds=2, prompts=10, candidates=2.0, audit_pairs=15)
    rounds = plan(prompts, its, 60)
    assert [one.number for one in rounds] == [0, 1, 2, 3]
    assert [one.step for one in rounds] == [0, 12, 36, 60]
    assert [one.refreshes for one in rounds] == [False, True, True, False]
    texts = [{prompt.text for prompt in one.candidates} for one in rounds]
    assert [len(some) for some in texts] == [0, 20, 20, 0]
    assert not texts[1] & texts[2]
    audit = {prompt.text for prompt in rounds[0].audit}
    assert len(audit) == 15
    assert not audit & (texts[1] | texts[2])
    assert all(list(one.audit) == list(rounds[0].audit) for one in rounds)
    assert [one.number for one in plan(prompts, FeedbackSettings(rounds=2, audit_pairs=0), 60)] == [1, 2]


def test_too_few_prompts_are_asked_about_again():
    rounds = plan([Prompt("only", None, {})], FeedbackSettings(rounds=1, prompts=3, candidates=1.0), 9)
    assert len(rounds[1].candidates) == 3
