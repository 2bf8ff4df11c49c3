"""From what is scored to what is learned: truncation, the price of length, and the order of these."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf.ppo.experience import gather
from rlhf.ppo.rewards import shaped_scores, token_rewards
from rlhf.ppo.settings import PpoSettings, ShapingSettings
from rlhf.wire.records import FinishReason
from support.rollouts import rollout, scored


def completion(text="", tokens=2, score=2.0, finish_reason=FinishReason.LENGTH):
    made = scored([1, *range(2, 2 + tokens)], 1, score=score, finish_reason=finish_reason)
    return replace(made, text=text)


@pytest.mark.parametrize(
    ("shaping", "text", "read"),
    [
        (ShapingSettings(), "One. Two. Three", "One. Two. Three"),
        (ShapingSettings(truncate_at="."), "One. Two. Three", "One."),
        (ShapingSettings(truncate_at="."), ".", "."),
        (ShapingSettings(truncate_at=".", truncate_after=4), "One. Two. Three", "One. Two."),
        (ShapingSettings(truncate_at=".", truncate_after=3), "One. Two. Three", "One."),
        (ShapingSettings(truncate_at=".", truncate_after=99), "One. Two. Three", "One. Two. Three"),
        (ShapingSettings(truncate_at="\n\n"), "One\nTwo\n\nThree", "One\nTwo\n\n"),
    ],
)
def test_what_the_reward_model_reads(shaping, text, read):
    assert shaping.scored(text) == read
    assert shaping.truncates(text) == (text[len(read) :] != "" or text == ".")


def test_an_empty_text_to_truncate_at_is_refused():
    with pytest.raises(ValidationError, match="is empty and would be found everywhere"):
        ShapingSettings(truncate_at="")


def test_a_completion_that_was_truncated_counts_as_ended():
    """lm-human-preferences: without the truncation token the score is -1, whether there was an end token or not."""
    experience = gather(
        [
            rollout(0, completion("Fine. And so")),
            rollout(1, completion("Fine and so")),
            rollout(2, completion("Fine and so", finish_reason=FinishReason.EOS)),
        ]
    )
    settings = PpoSettings(missing_eos_penalty=1.0, missing_eos="replace")
    assert shaped_scores(experience, settings, ShapingSettings(truncate_at=".")).tolist() == [2.0, -1.0, 2.0]
    assert shaped_scores(experience, settings).tolist() == [-1.0, -1.0, 2.0]


def test_tokens_beyond_the_free_ones_cost():
    experience = gather([rollout(i, completion(tokens=tokens)) for i, tokens in enumerate((1, 3, 5))])
    shaping = ShapingSettings(length_penalty=0.25, length_free_tokens=3)
    assert shaped_scores(experience, PpoSettings(), shaping).tolist() == [2.0, 2.0, 1.5]
    assert shaped_scores(experience, PpoSettings(), ShapingSettings(length_penalty=0.5)).tolist() == [1.5, 0.5, -0.5]


def test_the_clip_does_not_swallow_the_price_of_a_token():
    experience = gather([rollout(0, completion(tokens=4, score=100.0))])
    shaping = ShapingSettings(length_penalty=1.0)
    assert shaped_scores(experience, PpoSettings(score_clip=5.0), shaping).tolist() == [1.0]


def test_rewards_per_token_and_per_sequence_add_up():
    per_token = replace(completion(tokens=3), token_rewards=np.array([9.0, 0.5, 0.25, 0.125], dtype=np.float32))
    experience = gather([rollout(0, per_token, completion(tokens=2))])
    rewards = token_rewards(experience, experience.scores, torch.zeros(7), 0.0)
    assert rewards.tolist() == [0.0, 0.5, 0.25, 2.125, 0.0, 0.0, 2.0]
    assert experience.sum_per_sequence(rewards).tolist() == [2.875, 2.0]


def test_where_members_disagree_the_score_is_less():
    torn = replace(completion(score=2.0), member_scores=np.array([1.0, 3.0], np.float32))
    experience = gather([rollout(0, torn, completion(score=2.0))])
    assert experience.spreads.tolist() == [1.0, 0.0]
    shaping = ShapingSettings(spread_penalty=0.5)
    assert shaped_scores(experience, PpoSettings(), shaping).tolist() == [1.5, 2.0]
    assert shaped_scores(experience, PpoSettings()).tolist() == [2.0, 2.0]
