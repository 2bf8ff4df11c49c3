"""How a minibatch is cut: every sequence once, hardly any padding, and the same update."""

import itertools

import numpy as np
import pytest
import torch

from rlhf.ppo.experience import PASS_COSTS_TOKENS, gather, minibatches, together
from rlhf.ppo.learner import Targets
from support.rollouts import rollout, scored
from support.steps import tiny_step
from support.tiny import tiny_lm


def experience_of(lengths, prompt_tokens=2, seed=0):
    """Random tokens in sequences of these lengths."""
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(5, 270, length).tolist() for length in lengths]
    return gather([rollout(row, scored(ids, prompt_tokens)) for row, ids in enumerate(drawn)])


def spread(count, seed=0, prompt=(8, 32), mean=48, most=192):
    """Lengths of prompts, uniform, and of completions that end by chance or are cut off."""
    generator = np.random.default_rng(seed)
    return (generator.integers(*prompt, count) + generator.geometric(1 / mean, count).clip(max=most)).tolist()


def padded(micro):
    return micro.place_mask.numel()


def padding(micro):
    return padded(micro) - int(micro.place_mask.sum())


def share_of_padding(micros):
    return sum(map(padding, micros)) / sum(map(padded, micros))


def cheapest(lengths):
    """Tokens, padding and passes of the best way to cut sequences in the order of their lengths, by trying them all."""
    lengths, best = sorted(lengths, reverse=True), [0]
    for end in range(1, len(lengths) + 1):
        best.append(min(best[i] + lengths[i] * (end - i) + PASS_COSTS_TOKENS for i in range(end)))
    return best[-1]


@pytest.mark.parametrize(("count", "most_padding"), [(64, 0.15), (512, 0.06)])
def test_hardly_anything_is_computed_for_padding(count, most_padding):
    lengths = spread(count)
    experience = experience_of(lengths)
    assert share_of_padding([together(experience)]) > 0.5
    (micros,) = minibatches(experience, 1, 16384, torch.randperm(count, generator=torch.Generator().manual_seed(1)))
    print(f"{count} sequences: {share_of_padding(micros):.1%} padding in {len(micros)} micro-batches")
    assert share_of_padding(micros) < most_padding
    assert max(map(padding, micros)) <= PASS_COSTS_TOKENS
    assert sum(map(padded, micros)) + PASS_COSTS_TOKENS * len(micros) < 1.1 * cheapest(lengths)


def test_sequences_of_one_length_stay_together():
    """Cutting them would cost passes and save nothing."""
    (micros,) = minibatches(experience_of([30] * 64), 1, 16384, torch.arange(64))
    assert [padding(micro) for micro in micros] == [0]
    (micros,) = minibatches(experience_of([30] * 64), 1, 600, torch.arange(64))
    assert [len(micro.place_mask) for micro in micros] == [20, 20, 20, 4]


@pytest.mark.parametrize("micro_batch_tokens", [1, 300, 16384])
def test_every_sequence_is_in_one_micro_batch_of_its_own_minibatch(micro_batch_tokens):
    experience = experience_of(spread(50))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    parts = list(minibatches(experience, 3, micro_batch_tokens, order))
    for dealt, part in zip(order.tensor_split(3), parts, strict=True):
        expected = {int(experience.cu_seqlens[row]) for row in dealt}
        found = [int(micro.indices[start]) for micro in part for start in _starts(micro)]
        assert sorted(found) == sorted(expected)
        assert all(padded(micro) <= micro_batch_tokens or len(micro.place_mask) == 1 for micro in part)
    everything = torch.cat([micro.indices for part in parts for micro in part])
    assert everything.sort().values.equal(torch.arange(len(experience.token_ids)))


def _starts(micro):
    lengths = micro.place_mask.sum(1).tolist()
    return itertools.accumulate([0, *lengths[:-1]])


def test_the_same_order_makes_the_same_micro_batches():
    experience = experience_of(spread(64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    one, other = (next(minibatches(experience, 1, 2000, order)) for _ in range(2))
    assert all(a.indices.equal(b.indices) for a, b in zip(one, other, strict=True))


def test_the_gradient_is_that_of_one_micro_batch():
    experience = experience_of(spread(32, prompt=(4, 8), mean=20, most=56))
    advantages = torch.randn(len(experience.token_ids), generator=torch.Generator().manual_seed(2))
    moved = {}
    for name, cut in (("together", [together(experience)]), ("cut", _cut(experience))):
        learner = tiny_step(max_grad_norm=1e9).learner
        before = learner.assess(experience, cut)
        learner.improve(
            experience, cut, Targets(before.logprobs, before.logprobs, before.values, advantages, advantages)
        )
        moved[name] = {key: state["exp_avg"] for key, state in _states(learner)}
    for key, expected in moved["together"].items():
        torch.testing.assert_close(moved["cut"][key], expected, atol=1e-7, rtol=1e-4)


def _cut(experience):
    (micros,) = minibatches(experience, 1, 16384, torch.arange(experience.sequences))
    assert len(micros) > 2
    return micros


def _states(learner):
    for name, optimizer in learner.optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            yield (name, index), state


def test_the_first_ratio_is_exactly_one_whatever_the_lengths():
    """Of the first minibatch, which is cut as it was when the old log-probs were computed."""
    step = tiny_step(policy=tiny_lm(), minibatches=2, micro_batch_tokens=700)
    lengths = spread(48, prompt=(4, 8), mean=20, most=56)
    generator = np.random.default_rng(0)
    rollouts = [
        rollout(
            row, scored(generator.integers(5, 270, n).tolist(), 2, score=float(row % 3), ref_logprobs=[-5.0] * (n - 2))
        )
        for row, n in enumerate(lengths)
    ]
    assert step(rollouts).first_ratio_error == 0.0
