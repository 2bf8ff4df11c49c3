"""What each estimator of KL does in the reward and in the loss: its mean, its gradient, and the policy it leads to.

In the reward a penalty acts through the probabilities of the tokens that it is paid for, so only one that depends on
the sampled token can hold that token back: k1 = log π - log π_ref does, and its gradient is that of the KL. In the loss
a penalty is differentiated itself. Hence, for tokens sampled from the policy,

    loss estimator    E[∇ estimate]                                 what it penalises, in every state visited
    k1                E[∇ log π] = 0                                nothing
    k2                E[(log π - log π_ref) ∇ log π]                KL(π ‖ π_ref)
    k3                E[(1 - π_ref / π) ∇ log π] = -E_ref[∇ log π]  KL(π_ref ‖ π), the other way round
    abs               E[sign(π - π_ref) ∇ log π]                    Σ |π - π_ref|
    exact             ∇ KL(π ‖ π_ref)                               KL(π ‖ π_ref)

A penalty in the loss sees the states as they come: it does not know that a token leads to states that cost more KL.
"""

from __future__ import annotations

import math

import pytest
import torch

from oracle.play import exact_gradient, new_trial
from oracle.statistics import assert_mean_is
from oracle.world import (
    backwards_policy,
    gae,
    kl,
    new_world,
    objective,
    optimum,
    random_table,
    response_logprobs,
    rest_with_forward_kl,
    score_function,
    visits,
)
from rlhf.errors import SettingsError
from rlhf.ppo.settings import KlSettings
from rlhf.ppo.setup import check_penalty
from rlhf.settings.run import Settings

WORLD = new_world(vocabulary=3, longest=3, spread=2.0)
LOG_REF, LOG_P = random_table(WORLD, seed=1), random_table(WORLD, seed=2)
BETA = 0.3
ESTIMATES = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
    "abs": lambda d: d.abs(),
}
STATE_PENALTY = {
    "k1": lambda log_p: torch.zeros(WORLD.over, dtype=torch.float64),
    "k2": lambda log_p: kl(log_p, LOG_REF),
    "k3": lambda log_p: kl(LOG_REF, log_p),
    "abs": lambda log_p: (log_p.exp() - LOG_REF.exp()).abs().sum(-1),
    "exact": lambda log_p: kl(log_p, LOG_REF),
}


def trial_with(kl_settings, log_p=LOG_P, **settings):
    return new_trial(WORLD, kl=kl_settings, log_ref=LOG_REF, log_p=log_p, **settings)


def of_scores(log_p):
    """The policy gradient of the scores alone."""
    advantages = gae(WORLD, WORLD.per_token(WORLD.score_table), torch.zeros(WORLD.over).double(), 1.0, 1.0)
    return score_function(WORLD, log_p, advantages)


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_unbiased_estimators_have_the_mean_of_the_exact_kl_per_response(estimator):
    trial = trial_with(KlSettings(coef=BETA, estimator=estimator))
    truth = kl(response_logprobs(WORLD, LOG_P), response_logprobs(WORLD, LOG_REF)).mean().item()
    n = 2000
    figures = trial.step(trial.rollouts(n))
    of_token = ESTIMATES["k1"](LOG_P - LOG_REF) if estimator != "exact" else kl(LOG_P, LOG_REF)[:, None].expand(-1, 3)
    of_response = WORLD.per_token(of_token).sum(-1)
    probability = response_logprobs(WORLD, LOG_P).exp()
    spread = ((probability * of_response.square()).sum(-1) - (probability * of_response).sum(-1).square()).mean().sqrt()
    assert (probability * of_response).sum(-1).mean().item() == pytest.approx(truth)
    assert abs(figures.kl_mean - truth) < 4 * spread.item() / math.sqrt(2 * n)
    paid = WORLD.per_token(ESTIMATES[estimator](LOG_P - LOG_REF) if estimator != "exact" else of_token).sum(-1)
    assert (probability * paid).sum(-1).mean().item() == pytest.approx(truth)
    shaped = WORLD.scores - BETA * paid
    variance = (probability * shaped.square()).sum(-1) - (probability * shaped).sum(-1).square()
    expected = (probability * shaped).sum(-1).mean().item()
    assert abs(figures.reward_mean - expected) < 4 * (variance.mean() / (2 * n)).sqrt().item()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_gradient_of_an_estimator_in_the_reward(estimator):
    """Each estimate is a reward like another; of the four only k1 gives the gradient of the objective."""
    trial = trial_with(KlSettings(coef=BETA, estimator=estimator))
    rewards = WORLD.per_token(WORLD.score_table - BETA * ESTIMATES[estimator](LOG_P - LOG_REF))
    advantages = gae(WORLD, rewards, torch.zeros(WORLD.over).double(), 1.0, 1.0)
    expected = exact_gradient(trial, lambda log_p: score_function(WORLD, log_p, advantages))
    of_objective = exact_gradient(trial, lambda log_p: -objective(WORLD, log_p, LOG_REF, BETA))
    off = torch.dist(expected, of_objective) / of_objective.norm()
    assert off < 1e-6 if estimator == "k1" else off > 0.2
    # Of k2 and k3 the gradient is small beside its noise.
    assert_mean_is(trial.gradients(batches=64 if estimator in ("k2", "k3") else 32), expected)


def test_exact_kl_in_the_reward_has_the_gradient_of_the_objective():
    """The KL of a state is the same whatever token is sampled there, so as a reward alone it would hold nothing back in
    that state: it needs its own gradient in the loss beside it."""
    trial = trial_with(KlSettings(coef=BETA, estimator="exact"))
    expected = exact_gradient(trial, lambda log_p: -objective(WORLD, log_p, LOG_REF, BETA))
    assert_mean_is(trial.gradients(), expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "exact"])
def test_the_gradient_of_an_estimator_in_the_loss(estimator):
    """The table of this module's docstring."""
    trial = trial_with(KlSettings(coef=0.0, loss_coef=BETA, loss_estimator=estimator))
    often = visits(WORLD, LOG_P)

    def loss(log_p):
        return of_scores(log_p) + BETA * (often * STATE_PENALTY[estimator](log_p)).sum()

    expected = exact_gradient(trial, loss)
    if estimator != "k1":
        assert torch.dist(expected, exact_gradient(trial, of_scores)) > 0.1 * expected.norm()
    assert_mean_is(trial.gradients(), expected)


def myopic(s, q):
    """argmax Σ π q - β KL(π ‖ π_ref): π ∝ π_ref exp(q / β)."""
    return torch.log_softmax(LOG_REF[s] + q / BETA, -1)


def forward(s, q):
    """argmax Σ π q - β KL(π_ref ‖ π)."""
    return rest_with_forward_kl(LOG_REF[s], q, BETA)


@pytest.mark.parametrize(
    ("settings", "goal"),
    [
        (KlSettings(coef=BETA, estimator="exact"), None),
        (KlSettings(coef=0.0, loss_coef=BETA, loss_estimator="exact"), myopic),
        (KlSettings(coef=0.0, loss_coef=BETA, loss_estimator="k2"), myopic),
        (KlSettings(coef=0.0, loss_coef=BETA, loss_estimator="k3"), forward),
    ],
    ids=["reward exact", "loss exact", "loss k2", "loss k3"],
)
def test_where_the_policy_comes_to_rest(settings, goal):
    """With the penalty in the loss, every state is at rest where its own policy maximises Q minus its own penalty, with
    Q(s, a) the score to be expected under the policy itself: `backwards_policy` puts the states together. That is not
    π*, whose Q counts the KL still to come.
    """
    log_star = optimum(WORLD, LOG_REF, BETA)
    log_goal = log_star
    if goal is not None:
        log_goal = response_logprobs(WORLD, backwards_policy(WORLD, WORLD.score_table, goal))
        assert kl(log_goal, log_star).mean() > 0.02, "or the two could not be told apart"
    trial = trial_with(settings, log_p=LOG_REF, lr=0.15, critic_lr=0.3)
    trial.run(steps=80, prompts=64)
    assert trial.distance(log_goal) < 0.02
    if goal is not None:
        assert trial.distance(log_star) > 0.02


@pytest.mark.parametrize("ppo", [{"estimator": "grpo", "completions": 2}, {"whiten_rewards": True}])
def test_an_exact_penalty_beside_what_rescales_rewards_is_refused(ppo):
    """The token's own share, which the advantage owes it, would be in other units than the rest."""
    with pytest.raises(SettingsError, match=r"kl\.estimator"):
        check_penalty(Settings.model_validate({"ppo": ppo, "kl": {"estimator": "exact"}}))
    check_penalty(Settings.model_validate({"ppo": ppo, "kl": {"coef": 0.0, "loss_coef": 0.1, "estimator": "exact"}}))
