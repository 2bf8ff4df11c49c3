"""Gradients that the trainer computes from samples, against their exact expectations."""

from __future__ import annotations

import pytest
import torch

from oracle.groups import expected_group_advantages
from oracle.models import tiny_llama
from oracle.play import exact_gradient, new_trial
from oracle.statistics import assert_mean_is
from oracle.world import (
    action_values,
    gae,
    new_world,
    objective,
    random_table,
    response_logprobs,
    score_function,
)
from rlhf.ppo.estimators import ESTIMATORS
from rlhf.ppo.settings import KlSettings

WORLD = new_world(vocabulary=3, longest=3, spread=2.0)
LOG_REF, LOG_P = random_table(WORLD, seed=1), random_table(WORLD, seed=2)
VALUES = 0.5 * torch.randn(WORLD.over, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
"""A critic that is wrong about everything: as a baseline it must change nothing on average."""
BETA = 0.3


def penalised(log_p, log_ref=LOG_REF, world=WORLD):
    """[X, Y, L]: the score with the last token, and -β k1 with every token."""
    return world.per_token(world.score_table - BETA * (log_p - log_ref))


def table_trial(**settings):
    return new_trial(WORLD, kl=KlSettings(coef=BETA), log_ref=LOG_REF, log_p=LOG_P, values=VALUES, **settings)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_gradient_of_a_table_is_that_of_the_objective(critic):
    """With λ = 1 any critic is a baseline, and -E[Σ A ∇ log π] is the gradient of -(E[score] - β KL)."""
    trial = table_trial(critic=critic, temperature=0.6)
    expected = exact_gradient(trial, lambda log_p: -objective(WORLD, log_p, LOG_REF, BETA))
    assert_mean_is(trial.gradients(), expected)


def test_the_gradient_of_a_llama_is_that_of_the_objective():
    trial = new_trial(
        WORLD,
        kl=KlSettings(coef=BETA),
        policy=tiny_llama(WORLD, seed=0),
        reference=tiny_llama(WORLD, seed=1),
        values=VALUES,
        temperature=0.7,
    )
    expected = exact_gradient(trial, lambda log_p: -objective(WORLD, log_p, trial.log_ref, BETA))
    assert_mean_is(trial.gradients(), expected, precision=0.1)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.8), (0.9, 0.5)])
def test_the_gradient_with_gae_is_that_of_the_double_sum(gamma, lam):
    """A wrong critic biases it for λ < 1; the bias is the one that the definition has."""
    trial = table_trial(gamma=gamma, gae_lambda=lam)
    advantages = gae(WORLD, penalised(LOG_P), VALUES, gamma, lam)
    expected = exact_gradient(trial, lambda log_p: score_function(WORLD, log_p, advantages))
    unbiased = exact_gradient(trial, lambda log_p: -objective(WORLD, log_p, LOG_REF, BETA))
    assert torch.dist(expected, unbiased) > 0.1 * unbiased.norm(), "or the test would not tell them apart"
    assert_mean_is(trial.gradients(), expected)


def minus_objective(log_p):
    return -objective(WORLD, log_p, LOG_REF, BETA)


def of_groups(completions, divided):
    """Every token of a response has the advantage that the response is expected to have in its group."""
    log_y = response_logprobs(WORLD, LOG_P)
    returns = WORLD.scores - BETA * (log_y - response_logprobs(WORLD, LOG_REF))
    advantages = expected_group_advantages(log_y.exp(), returns, completions, divided)
    return lambda log_p: score_function(WORLD, log_p, advantages.unsqueeze(-1).expand_as(WORLD.path))


ESTIMATES = {
    "gae": (minus_objective, {}),
    "a2c": (minus_objective, {"gae_lambda": 0.5}),
    "rloo": (minus_objective, {"completions": 3}),
    "grpo": (of_groups(3, divided=True), {"completions": 3}),
    "grpo undivided": (of_groups(3, divided=False), {"completions": 3, "grpo_std": False}),
    "reinforce++": (minus_objective, {"whiten_advantages": False}),
}


def test_every_estimator_is_here():
    assert {name.split()[0] for name in ESTIMATES} == set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_gradient_of_an_estimator(name):
    """gae (λ = 1), a2c and rloo have the objective's, whatever the critic says; grpo that of its expected advantages by
    enumeration of groups: undivided (K - 1)/K of the objective's. reinforce++ subtracts the mean of the very batch,
    which takes a share of the order of 1 / batch away: below the sampling error here.
    """
    loss, settings = ESTIMATES[name]
    trial = table_trial(estimator=name.split()[0], **settings)
    expected = exact_gradient(trial, loss)
    if name == "grpo undivided":
        torch.testing.assert_close(expected, 2 / 3 * exact_gradient(trial, minus_objective))
    if name == "grpo":
        assert torch.cosine_similarity(expected, exact_gradient(trial, minus_objective), dim=0) < 0.999
    completions = settings.get("completions", 1)
    assert_mean_is(trial.gradients(completions), expected)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_advantages_of_an_exact_critic_are_exact(lam):
    """No sampling is left in them: with λ = 0 each token's is Q(s, a) - V(s)."""
    q, v = action_values(WORLD, LOG_P, WORLD.score_table - BETA * (LOG_P - LOG_REF))
    trial = new_trial(
        WORLD, kl=KlSettings(coef=BETA), log_ref=LOG_REF, log_p=LOG_P, values=v, gae_lambda=lam, temperature=0.8
    )
    batch = trial.rollouts(prompts=100)
    targets = trial.targets(batch)
    exact = gae(WORLD, penalised(LOG_P), v, 1.0, lam)
    if lam == 0.0:
        torch.testing.assert_close(exact, WORLD.per_token(q - v[:, None]))
    index = {response: y for y, response in enumerate(WORLD.responses)}
    start, seen = 0, set()
    for rollout in batch:
        prompt, *response = rollout.completions[0].token_ids.tolist()
        x, y = WORLD.prompts.index(prompt), index[tuple(response)]
        found = targets.advantages[start : start + 1 + len(response)]
        assert found[0] == 0
        assert found[1:].tolist() == pytest.approx(exact[x, y, : len(response)].tolist(), abs=2e-6)
        start += 1 + len(response)
        seen.add((x, y))
    assert len(seen) > len(WORLD.responses)


def test_the_gradient_of_the_clipped_objective_off_policy():
    """Another policy wrote the responses and said so: E_old[Σ max(-A ρ, -A clip(ρ))], by enumeration."""
    trial = table_trial(old_logprobs="service", clip_range=0.3)
    old = random_table(WORLD, seed=7, spread=0.5)
    trial.sampler = torch.log_softmax(LOG_P + 0.5 * old, -1)
    advantages = gae(WORLD, penalised(trial.sampler), VALUES, 1.0, 1.0)
    probability = WORLD.per_token(trial.sampler).sum(-1).exp()

    def clipped_loss(log_p):
        ratio = WORLD.per_token(log_p - trial.sampler).exp()
        worse = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.7, 1.3))
        return (probability * torch.where(WORLD.token_mask, worse, 0.0).sum(-1)).sum(-1).mean()

    expected = exact_gradient(trial, clipped_loss)
    unclipped = exact_gradient(trial, lambda log_p: score_function(WORLD, log_p, advantages))
    assert torch.dist(expected, unclipped) > 0.3 * unclipped.norm(), "or the clip would not be seen"
    assert_mean_is(trial.gradients(), expected)
