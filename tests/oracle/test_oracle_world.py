"""The oracle itself: what it says in one way must be what it says in another."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from oracle.models import TablePolicy, hidden_table, log_table, tiny_llama
from oracle.play import new_trial
from oracle.world import (
    action_values,
    backwards_policy,
    gae,
    kl,
    new_world,
    objective,
    optimum,
    random_table,
    response_logprobs,
    score_function,
    visits,
)
from rlhf.ppo.settings import KlSettings

WORLD = new_world()
LOG_REF, LOG_P = random_table(WORLD, seed=1), random_table(WORLD, seed=2)


def test_the_list_of_responses_is_complete():
    assert len(WORLD.responses) == 1 + 3 + 3 * 3 * 4
    assert len(WORLD.states) == 2 * (1 + 3 + 9)
    assert sum(response[-1] != 0 for response in WORLD.responses) == 3**3
    big = new_world(vocabulary=8, longest=4)
    assert (len(big.responses), len(big.states)) == (1 + 7 + 49 + 343 * 8, 2 * (1 + 7 + 49 + 343))


def test_probabilities_of_all_responses_sum_to_one():
    torch.testing.assert_close(response_logprobs(WORLD, LOG_P).exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert visits(WORLD, LOG_P).sum() == pytest.approx(
        (response_logprobs(WORLD, LOG_P).exp() * WORLD.lengths).sum(-1).mean().item()
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_reaches_beta_log_z_and_nothing_is_better(beta):
    """E[score] - β KL(π ‖ π_ref) = β log Z - β KL(π ‖ π*)."""
    log_z = torch.logsumexp(response_logprobs(WORLD, LOG_REF) + WORLD.scores / beta, -1)
    log_star = optimum(WORLD, LOG_REF, beta)
    for log_p in (LOG_P, LOG_REF, random_table(WORLD, seed=3)):
        distance = kl(response_logprobs(WORLD, log_p), log_star)
        value = objective(WORLD, log_p, LOG_REF, beta).item()
        assert value == pytest.approx((beta * log_z - beta * distance).mean().item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_over_responses_is_the_one_found_state_by_state(beta):
    """π*(a | s) ∝ π_ref(a | s) exp(Q(s, a) / β), where Q counts the KL still to come: V = β log Σ π_ref exp(Q / β)."""
    log_star = torch.zeros_like(LOG_REF)
    values = torch.zeros(WORLD.over + 1, dtype=torch.float64)
    for s in reversed(range(WORLD.over)):
        q = WORLD.score_table[s] + values[WORLD.next_state[s]]
        log_star[s] = torch.log_softmax(LOG_REF[s] + q / beta, -1)
        values[s] = beta * torch.logsumexp(LOG_REF[s] + q / beta, -1)
    torch.testing.assert_close(response_logprobs(WORLD, log_star), optimum(WORLD, LOG_REF, beta))
    rewards = WORLD.score_table - beta * (log_star - LOG_REF)
    torch.testing.assert_close(action_values(WORLD, log_star, rewards)[1], values[:-1])


def test_the_gradient_vanishes_at_the_optimum_and_only_there():
    one_step = new_world(longest=1)
    log_ref = random_table(one_step, seed=1)
    log_star = optimum(one_step, log_ref, 1.0)
    for table, vanishes in ((log_star, True), (log_ref, False)):
        logits = table.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(one_step, torch.log_softmax(logits, -1), log_ref, 1.0), logits)
        assert (gradient.abs().max() < 1e-12) == vanishes
    found = backwards_policy(one_step, one_step.score_table, lambda s, q: torch.log_softmax(log_ref[s] + q, -1))
    torch.testing.assert_close(found, log_star)


def test_the_score_function_has_the_gradient_of_the_objective():
    """The policy gradient theorem: with any baseline, and with the KL penalty as part of a constant reward."""
    beta = 0.3
    rewards = WORLD.per_token(WORLD.score_table - beta * (LOG_P - LOG_REF))
    baseline = torch.randn(WORLD.over, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for loss in (
        lambda log_p: score_function(WORLD, log_p, gae(WORLD, rewards, baseline, 1.0, 1.0)),
        lambda log_p: -objective(WORLD, log_p, LOG_REF, beta),
    ):
        logits = LOG_P.clone().requires_grad_()
        found.append(torch.autograd.grad(loss(torch.log_softmax(logits, -1)), logits)[0])
    torch.testing.assert_close(found[0], found[1])


def test_advantages_are_one_step_of_gae_with_exact_values():
    rewards = WORLD.score_table - 0.3 * (LOG_P - LOG_REF)
    q, v = action_values(WORLD, LOG_P, rewards)
    found = gae(WORLD, WORLD.per_token(rewards), v, 1.0, 0.0)
    torch.testing.assert_close(found, WORLD.per_token(q - v[:, None]))
    torch.testing.assert_close((LOG_P.exp() * (q - v[:, None])).sum(-1), torch.zeros(WORLD.over, dtype=torch.float64))


def test_the_kl_of_responses_is_the_kl_of_their_tokens_summed_over_the_states_visited():
    of_responses = kl(response_logprobs(WORLD, LOG_P), response_logprobs(WORLD, LOG_REF)).mean()
    of_tokens = (visits(WORLD, LOG_P) * kl(LOG_P, LOG_REF)).sum()
    assert of_tokens.item() == pytest.approx(of_responses.item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_table_as_a_model_has_the_tables_log_probs(temperature):
    model = TablePolicy(WORLD, LOG_P, temperature)
    torch.testing.assert_close(log_table(model, WORLD, temperature), LOG_P, atol=1e-6, rtol=0)
    assert not torch.allclose(log_table(model, WORLD, 1.3), LOG_P, atol=1e-2)


def test_a_llamas_table_is_what_it_says_of_whole_sequences():
    model, temperature = tiny_llama(WORLD), 0.7
    table = WORLD.per_token(log_table(model, WORLD, temperature))
    for x, y in itertools.product(range(2), range(0, len(WORLD.responses), 7)):
        response = WORLD.responses[y]
        ids = torch.tensor([[WORLD.prompts[x], *response]])
        log_p = torch.log_softmax(model(input_ids=ids).logits[0].double() / temperature, -1)
        expected = sum(log_p[t, token] for t, token in enumerate(response))
        assert table[x, y].sum().item() == pytest.approx(expected.item(), abs=1e-5)
    assert hidden_table(model, WORLD).shape == (WORLD.over, 16)


def test_rollouts_are_drawn_as_often_as_they_are_probable():
    trial = new_trial(WORLD, kl=KlSettings(), log_ref=LOG_REF, log_p=LOG_P, temperature=0.7)
    n = 1000
    found = torch.zeros(2, len(WORLD.responses), dtype=torch.float64)
    index = {response: y for y, response in enumerate(WORLD.responses)}
    for r in trial.rollouts(n):
        (completion,) = r.completions
        prompt, *response = completion.token_ids.tolist()
        x, y = WORLD.prompts.index(prompt), index[tuple(response)]
        found[x, y] += 1 / n
        assert completion.score == pytest.approx(WORLD.scores[x, y].item())
        of_response = completion.logprobs[completion.response_mask].sum()
        assert of_response == pytest.approx(response_logprobs(WORLD, LOG_P)[x, y].item(), abs=1e-5)
    probability = response_logprobs(WORLD, LOG_P).exp()
    z = (found - probability) / (probability * (1 - probability) / n).sqrt()
    assert z.abs().max() < 4.5
    assert math.isclose(found.sum().item(), 2.0)
