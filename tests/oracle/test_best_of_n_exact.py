"""Best of n by enumeration: its distance from the policy beside the bound, and its mean beside the estimator."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from oracle.world import kl, new_world, optimum, random_table, response_logprobs
from rlhf.evaluate.scaling import best_of_n_kl_bound, best_of_n_means

WORLD = new_world()
LOG_REF = random_table(WORLD, seed=1)
LOG_Y = response_logprobs(WORLD, LOG_REF)
NS = (1, 2, 3, 4, 8, 16, 64, 256)


def best_of_n(log_y: Tensor, scores: Tensor, n: int) -> Tensor:
    """[Y]: probabilities of the best of n responses, ties decided by lot.

    All n score at most s with probability F(s)^n, so the best one scores s with F(s)^n - F(below s)^n; among the
    responses of one score it is distributed as the policy is.
    """
    p = log_y.exp()
    at_most = torch.stack([p[scores <= s].sum() for s in scores])
    below = torch.stack([p[scores < s].sum() for s in scores])
    return p * (at_most**n - below**n) / (at_most - below)


def kl_of(q: Tensor, log_y: Tensor) -> float:
    """KL(q ‖ policy), where what underflowed counts nothing."""
    return (torch.xlogy(q, q) - q * log_y).sum().item()


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_the_distribution_is_the_one_of_all_tuples(n, ties):
    small = new_world(vocabulary=3, longest=2)
    log_y, scores = response_logprobs(small, random_table(small, seed=1))[0], small.scores[0]
    scores = (scores * 3).round() if ties else scores
    assert (len(scores.unique()) < len(scores)) == ties
    found = torch.zeros(len(scores), dtype=torch.float64)
    for drawn in itertools.product(range(len(scores)), repeat=n):
        tuple_scores = scores[list(drawn)]
        best = torch.tensor(drawn)[tuple_scores == tuple_scores.max()]
        probability = log_y[list(drawn)].sum().exp()
        found.index_add_(0, best, (probability / len(best)).expand(len(best)))
    torch.testing.assert_close(best_of_n(log_y, scores, n), found)


@pytest.mark.parametrize("x", [0, 1])
@pytest.mark.parametrize("n", NS)
def test_the_bound_holds_and_is_loose_where_responses_are_few(n, x):
    exact = kl_of(best_of_n(LOG_Y[x], WORLD.scores[x], n), LOG_Y[x])
    assert exact <= best_of_n_kl_bound(n) + 1e-12
    assert exact <= -LOG_Y[x, WORLD.scores[x].argmax()].item() + 1e-12
    if n == 1:
        assert exact == pytest.approx(0.0, abs=1e-12)
    else:
        assert exact < 0.99 * best_of_n_kl_bound(n)


def test_the_bound_is_approached_where_responses_are_many():
    """8 tokens of length 4, all nearly alike: 2801 responses; the bound knows no limit, the KL has one."""
    big = new_world(vocabulary=8, longest=4, prompts=(1,))
    log_y = response_logprobs(big, random_table(big, seed=1, spread=0.1))[0]
    exact = {n: kl_of(best_of_n(log_y, big.scores[0], n), log_y) for n in (*NS, 10**6)}
    bound = {n: best_of_n_kl_bound(n) for n in exact}
    assert all(0 <= bound[n] - exact[n] < 0.05 for n in (2, 4, 8))
    assert bound[10**6] - exact[10**6] > 3
    assert exact[10**6] == pytest.approx(-log_y[big.scores[0].argmax()].item(), abs=1e-6)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_no_policy_scores_more_at_its_distance_than_the_optimum(n):
    """Among all policies of one KL, π* ∝ π_ref exp(score / β) of the β that has that KL scores best."""
    best = best_of_n(LOG_Y[0], WORLD.scores[0], n)
    distance = kl_of(best, LOG_Y[0])
    low, high = 1e-3, 1e3
    for _ in range(100):
        beta = (low * high) ** 0.5
        low, high = (beta, high) if kl(optimum(WORLD, LOG_REF, beta)[0], LOG_Y[0]) > distance else (low, beta)
    log_star = optimum(WORLD, LOG_REF, beta)[0]
    assert kl(log_star, LOG_Y[0]).item() == pytest.approx(distance, rel=1e-6)
    of_star, of_bon = ((p * WORLD.scores[0]).sum().item() for p in (log_star.exp(), best))
    assert of_star > of_bon > (LOG_Y[0].exp() * WORLD.scores[0]).sum().item()


def test_the_estimator_of_the_best_scores_mean_is_unbiased():
    """What `rlhf evaluate --frontier` computes from 8 samples to a prompt, on average over 4000 of them."""
    drawn = torch.multinomial(
        LOG_Y[0].exp(), 4000 * 8, replacement=True, generator=torch.Generator().manual_seed(0)
    ).view(4000, 8)
    scores = WORLD.scores[0][drawn].numpy()
    ns = (1, 2, 4, 8)
    means = best_of_n_means(scores, scores, ns)
    for n, found in zip(ns, means, strict=True):
        exact = (best_of_n(LOG_Y[0], WORLD.scores[0], n) * WORLD.scores[0]).sum().item()
        assert abs(found.mean() - exact) < 4 * found.std() / len(found) ** 0.5, n
