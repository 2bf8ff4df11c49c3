"""Rollouts of older weights: importance weights, and a toy task on which PPO's own objective falls behind."""

from __future__ import annotations

import copy
import math
from collections import deque
from statistics import mean

import pytest
import torch

from rlhf.ppo.experience import gather
from rlhf.ppo.importance import importance_of
from rlhf.ppo.settings import KlSettings, PpoSettings
from support.rollouts import rollout, sampled_rollouts, scored
from support.steps import tiny_step, weights_of
from support.tiny import tiny_lm

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9]]
OBJECTIVES = {"ppo": {"old_logprobs": "service"}, "decoupled": {"objective": "decoupled"}}


def test_the_weight_is_the_ratio_of_probabilities_up_to_a_cap():
    experience = gather([rollout(0, scored([1, 2, 3, 4], 1, logprobs=[-1.0, -1.0, -3.0]))])
    proximal = torch.tensor([0.0, -1.0, -2.0, -1.0])
    settings = PpoSettings(objective="decoupled", importance_cap=4.0)
    found = importance_of(proximal, experience, settings)
    assert found.weights.tolist() == pytest.approx([1.0, 1.0, math.exp(-1), 4.0])
    assert found.capped_fraction == pytest.approx(1 / 3)
    assert importance_of(proximal, experience, PpoSettings()) is None


def stale_rollouts(policy, older, prompts=PROMPTS, seed=1):
    """What `older` samples, with its own log-probs."""
    generator = torch.Generator().manual_seed(seed)
    return sampled_rollouts(older, policy, prompts, share_of_even_tokens, new_tokens=6, generator=generator)


def share_of_even_tokens(response):
    return sum(token % 2 == 0 for token in response) / len(response)


def advantages_in(step, rollouts):
    """The targets of the step's first update."""
    seen = []
    improve = step.learner.improve
    step.learner.improve = lambda e, m, targets: seen.append(targets) or improve(e, m, targets)
    figures = step(rollouts)
    return seen[0], figures


def test_the_clip_is_around_the_weights_before_the_step_and_the_weight_around_those_that_sampled():
    older = tiny_lm()
    with torch.no_grad():
        for parameter in older.parameters():
            parameter.mul_(1.2)
    plain, decoupled = (tiny_step(estimator="reinforce++", importance_cap=1e9, **o) for o in OBJECTIVES.values())
    rollouts = stale_rollouts(plain.learner.policy, older)
    of_plain, plain_figures = advantages_in(plain, rollouts)
    of_decoupled, figures = advantages_in(decoupled, rollouts)
    assert figures.first_ratio_error == 0.0, "the proximal policy is the present one"
    assert plain_figures.first_ratio_error > 0.1
    mask = gather(rollouts).response_mask
    ratio = (of_decoupled.old_logprobs - gather(rollouts).service_logprobs)[mask].exp()
    assert figures.importance_mean == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert (figures.importance_capped_fraction, plain_figures.importance_mean) == (0.0, None)
    # Both penalties are k1 of their own old policy, so without a KL the advantages differ by the weight alone.
    free = [
        advantages_in(tiny_step(estimator="reinforce++", kl=KlSettings(coef=0.0), importance_cap=1e9, **o), rollouts)[0]
        for o in OBJECTIVES.values()
    ]
    torch.testing.assert_close(free[1].advantages[mask], free[0].advantages[mask] * ratio, rtol=1e-4, atol=1e-5)
    assert of_plain.old_logprobs[mask].equal(gather(rollouts).service_logprobs[mask])


def test_on_fresh_rollouts_both_objectives_make_the_same_step():
    """Up to the rounding by which the sampler's log-probs differ from the trainer's."""
    ends = []
    for options in ({}, OBJECTIVES["decoupled"]):
        step = tiny_step(**options)
        step(stale_rollouts(step.learner.policy, step.learner.policy))
        ends.append(weights_of(step.learner.policy))
    moved = (ends[0] - weights_of(tiny_lm())).norm()
    assert (ends[0] - ends[1]).norm() < 0.02 * moved


def learned(objective, staleness, *, steps, seed, batch=16, lr=3e-3, epochs=4):
    """Mean score at the end of a run whose rollouts are always `staleness` steps old, as soon as there are so many."""
    torch.manual_seed(seed)
    step = tiny_step(
        policy=tiny_lm(seed=seed), estimator="reinforce++", epochs=epochs, lr=lr, kl=KlSettings(coef=0.0),
        **OBJECTIVES[objective],
    )  # fmt: skip
    policy = step.learner.policy
    behind = deque(maxlen=staleness + 1)
    for number in range(steps):
        behind.append(copy.deepcopy(policy))
        step(stale_rollouts(policy, behind[0], PROMPTS * batch, seed=1000 * seed + number))
    fresh = stale_rollouts(policy, policy, PROMPTS * 64, seed=seed)
    return mean(one.completions[0].score for one in fresh)


def test_ppo_falls_behind_on_stale_rollouts_and_the_decoupled_objective_does_not():
    """One seed of the table in README.md."""
    fresh = learned("ppo", 0, steps=16, seed=0)
    naive, decoupled = (learned(objective, 4, steps=16, seed=0) for objective in ("ppo", "decoupled"))
    assert naive < decoupled < fresh + 0.05
    assert fresh - decoupled < 0.5 * (fresh - naive)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_how_much_staleness_each_objective_bears():
    """Prints the table in README.md."""
    found = {}
    for objective, staleness in (("ppo", 0), ("ppo", 4), ("decoupled", 4), ("ppo", 8), ("decoupled", 8)):
        scores = [learned(objective, staleness, steps=16, seed=seed) for seed in range(3)]
        found[objective, staleness] = mean(scores)
        print(f"| {objective} | {staleness} | {mean(scores):.3f} | {min(scores):.3f} | {max(scores):.3f} |", flush=True)
    for staleness in (4, 8):
        lost = {objective: found["ppo", 0] - found[objective, staleness] for objective in OBJECTIVES}
        assert lost["ppo"] > 0.05, staleness
        assert lost["decoupled"] < 0.6 * lost["ppo"], staleness
