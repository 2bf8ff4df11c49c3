"""Where every estimator's policy comes to rest: at π* ∝ π_ref exp(score / β), or where its bias moves it to.

The runs are those of the real optimisation step on sampled responses, learning rates falling to 0. At π* the score
minus β log(π* / π_ref) of a whole response is β log Z(x), the same for every response, so estimators that compare
responses to one prompt, or to a critic that knows β log Z, see advantages that vanish sample by sample, and need no
average to rest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oracle.groups import expected_group_advantages
from oracle.models import tiny_gpt2
from oracle.play import new_trial
from oracle.world import (
    backwards_policy,
    kl,
    new_world,
    optimum,
    random_table,
    response_logprobs,
    rest_with_forward_kl,
    visits,
)
from rlhf.ppo.estimators import ESTIMATORS
from rlhf.ppo.settings import KlSettings

TOLERANCE = 0.02
"""Nats of KL(π_θ ‖ goal)."""
WORLD = new_world(vocabulary=3, longest=3)
LOG_REF = random_table(WORLD, seed=1)
LOG_START = random_table(WORLD, seed=2, spread=0.5)
COMPLETIONS = {"gae": 1, "a2c": 1, "rloo": 4, "grpo": 4, "reinforce++": 1}


def new_run(name: str, beta: float, **settings):
    chosen = {"estimator": name, "completions": COMPLETIONS[name], "lr": 0.2, "critic_lr": 0.3, **settings}
    return new_trial(WORLD, log_ref=LOG_REF, log_p=LOG_START, kl=KlSettings(coef=beta), **chosen)


def test_every_estimator_is_here():
    assert set(COMPLETIONS) == set(ESTIMATORS)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", COMPLETIONS)
def test_the_policy_comes_to_rest_at_the_optimum(name, beta):
    """With the KL in the reward all five have π* as their only point of rest with every response possible.

    gae, a2c, rloo: their gradient is that of E[score] - β KL, which vanishes at π* alone; for λ < 1 because there the
    critic is exact, and every δ_t = 0.

    reinforce++: one baseline for the whole batch; a constant changes no expected gradient.

    grpo divides by the standard deviation of the group. At rest a tabular policy has, for every response,
    E[Â | y] = 0: in a state all tokens have the same E[Â | s, a], that of the state (or a logit would move), and so,
    from a prompt with E[Â] = 0 on, in all states down to the responses. The response of the largest
    R = score - β log(π / π_ref) is never below its group's mean, so E[Â | y] = 0 only if no response of its groups is
    below it either: all R are equal, and the policy is π*.
    """
    log_star = optimum(WORLD, LOG_REF, beta)
    trial = new_run(name, beta, gae_lambda=0.95)
    assert trial.distance(log_star) > 2 * TOLERANCE, "or there would be no way to go"
    trial.run(120 if beta < 0.5 else 60, 64 // COMPLETIONS[name], COMPLETIONS[name])
    assert trial.distance(log_star) < TOLERANCE


def test_several_passes_minibatches_and_whitened_advantages_lead_there_too():
    """As `rlhf ppo` does it by default: four passes, a clip, advantages of mean 0 and variance 1."""
    log_star = optimum(WORLD, LOG_REF, 0.5)
    trial = new_run(
        "gae", 0.5, epochs=4, minibatches=2, whiten_advantages=True, max_grad_norm=1.0, temperature=0.7, lr=0.05
    )
    trial.run(steps=40, prompts=64)
    assert trial.distance(log_star) < TOLERANCE


def test_a_penalty_for_responses_that_were_cut_is_part_of_the_score():
    """missing_eos_penalty: π* of score - penalty · [cut]."""
    shaped = replace(WORLD, scores=WORLD.scores - 0.8 * WORLD.cut_mask)
    log_star = optimum(shaped, LOG_REF, 0.5)
    assert kl(optimum(WORLD, LOG_REF, 0.5), log_star).mean() > 2 * TOLERANCE
    trial = new_run("gae", 0.5, missing_eos_penalty=0.8)
    trial.run(steps=70, prompts=64)
    assert trial.distance(log_star) < TOLERANCE


def test_whitened_rewards_pay_for_length():
    """Whitening puts (r_t - μ) / σ + μ in the place of every token's reward, so that a response of |y| tokens gets

        (R - |y| μ) / σ + |y| μ = (R + |y| μ (σ - 1)) / σ    with R = score - β log(π / π_ref).

    1 / σ scales all of it and moves no optimum; |y| μ (σ - 1) is a payment for every token. At rest
    π ∝ π_ref exp((score + |y| μ (σ - 1)) / β), where μ and σ are mean and standard deviation of the token rewards under
    that π itself: iterated until it stands.
    """
    beta, log_star = 0.5, optimum(WORLD, LOG_REF, 0.5)
    log_goal = log_star
    for _ in range(100):
        log_goal = optimum(
            replace(WORLD, scores=WORLD.scores + _paid_per_token(log_goal, beta) * WORLD.lengths), LOG_REF, beta
        )
    assert kl(log_goal, log_star).mean() > 2 * TOLERANCE, "or it would not matter"
    trial = new_run("gae", beta, whiten_rewards=True)
    trial.run(steps=100, prompts=64)
    assert trial.distance(log_goal) < TOLERANCE


def test_whitened_rewards_keep_their_mean():
    """Token by token: a shift too small to be seen where the policy comes to rest is seen here."""
    trial = new_run("gae", 0.5, whiten_rewards=True)
    batch = trial.rollouts(50)
    of_responses = []
    for completion in (rollout.completions[0] for rollout in batch):
        mask = completion.response_mask
        rewards = -0.5 * torch.from_numpy(completion.logprobs[mask] - completion.ref_logprobs[mask])
        rewards[-1] += completion.score
        of_responses.append(rewards)
    every = torch.cat(of_responses)
    to_go = [
        ((r - every.mean()) / every.std(correction=0) + every.mean()).flip(0).cumsum(0).flip(0) for r in of_responses
    ]
    found = trial.targets(batch).advantages
    expected = torch.cat([torch.cat([torch.zeros(1), part]) for part in to_go])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def _paid_per_token(log_y, beta: float):
    """μ (σ - 1) under the policy with these log-probs of responses, [X, Y]."""
    log_p = _table_of(log_y)
    rewards = WORLD.per_token(WORLD.score_table - beta * (log_p - LOG_REF))
    weights = (log_y.exp().unsqueeze(-1) * WORLD.token_mask) / (log_y.exp() * WORLD.lengths).sum()
    mean = (weights * rewards).sum()
    return mean * ((weights * (rewards - mean).square()).sum().sqrt() - 1)


def _table_of(log_y):
    """[X, Y] -> [S, V]: the policy that writes responses with these probabilities."""
    counts = torch.zeros(WORLD.over + 1, WORLD.vocabulary, dtype=torch.float64)
    weights = torch.where(WORLD.token_mask, log_y.exp().unsqueeze(-1), 0.0)
    counts.index_put_((WORLD.path, WORLD.tokens.expand_as(WORLD.path)), weights, accumulate=True)
    return torch.log(counts[:-1] / counts[:-1].sum(-1, keepdim=True))


@pytest.mark.parametrize("divided", [True, False])
def test_grpo_with_its_kl_in_the_loss(divided):
    """As in the paper: advantages of the scores alone, k3 in the loss. At rest every state maximises

        Σ_a π(a | s) q(s, a) - β KL(π_ref ‖ π)    ⟹    π(a | s) = β π_ref(a | s) / (λ_s - q(s, a)),

    because the gradient of k3 is that of the KL the other way round; q(s, a) is the expected advantage of responses
    that go on from there, E[Â | y] an expectation over the other completions of the group, by enumeration. Without the
    standard deviation that is (K - 1)/K of the score less its mean; with it, it depends on the policy, so the point is
    iterated until it stands.
    """
    beta, completions = 0.2, 3
    log_goal = _grpo_goal(beta, completions, divided)
    assert kl(log_goal, optimum(WORLD, LOG_REF, beta)).mean() > 2 * TOLERANCE
    trial = new_trial(
        WORLD, log_ref=LOG_REF, kl=KlSettings(coef=0.0, loss_coef=beta, loss_estimator="k3"),
        estimator="grpo", grpo_std=divided, completions=completions, lr=0.15,
    )  # fmt: skip
    trial.run(steps=100, prompts=32, completions=completions)
    assert trial.distance(log_goal) < TOLERANCE


def _grpo_goal(beta: float, completions: int, divided: bool):
    log_p = LOG_REF

    def at_rest(s, q):
        return rest_with_forward_kl(LOG_REF[s], q, beta)

    for _ in range(40):
        probability = response_logprobs(WORLD, log_p).exp()
        advantages = expected_group_advantages(probability, WORLD.scores, completions, divided)
        found = backwards_policy(WORLD, replace(WORLD, scores=advantages).score_table, at_rest)
        log_p = torch.log_softmax((log_p + found) / 2, -1)
    assert (visits(WORLD, log_p) * kl(log_p, found)).sum() < 1e-6, "it does not stand yet"
    return response_logprobs(WORLD, log_p)


def test_a_transformer_comes_to_rest_at_the_optimum():
    """Parameters that all states share."""
    world = new_world(vocabulary=3, longest=3, spread=2.0)
    models = {name: tiny_gpt2(world) for name in ("policy", "reference")}
    trial = new_trial(world, **models, kl=KlSettings(coef=0.5), lr=0.003, critic_lr=0.3, temperature=0.8)
    log_star = optimum(world, trial.log_ref, 0.5)
    assert trial.distance(log_star) > 10 * TOLERANCE
    trial.run(steps=150, prompts=64)
    assert trial.distance(log_star) < TOLERANCE
