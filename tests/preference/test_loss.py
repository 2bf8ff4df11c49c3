from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.preference.loss import all_pairs, bradley_terry, bradley_terry_sum

rankings = st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=5), min_size=1, max_size=4)


@given(rankings, st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_computed_at_once_it_is_the_definition(ranks: list[list[int]], seed: int) -> None:
    scores = torch.randn(sum(map(len, ranks)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    offsets = [sum(map(len, ranks[:number])) for number in range(len(ranks))]
    expected = sum(bradley_terry(part, r) for part, r in zip(scores.split([len(r) for r in ranks]), ranks, strict=True))
    torch.testing.assert_close(
        bradley_terry_sum(scores, all_pairs(ranks, offsets)).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_one_pair_is_minus_log_sigmoid() -> None:
    loss = bradley_terry(torch.tensor([2.0, 0.5]), (1, 2))
    assert float(loss) == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))


def test_ranking_counts_as_much_as_it_orders() -> None:
    """Equal scores: each pair's loss is log 2, so what remains is the weight, K - 1."""
    for count in (2, 3, 4, 9):
        ranks = list(range(1, count + 1))
        assert float(bradley_terry(torch.zeros(count), ranks)) == pytest.approx((count - 1) * math.log(2))
        assert float(all_pairs([ranks], [0]).share.sum()) == pytest.approx(count - 1)


def test_tie_pulls_scores_together() -> None:
    scores = torch.tensor([1.0, -1.0], requires_grad=True)
    bradley_terry_sum(scores, all_pairs([(1, 1)], [0])).backward()
    assert scores.grad is not None
    assert scores.grad[0] > 0 > scores.grad[1]
    equal = torch.zeros(2, requires_grad=True)
    bradley_terry_sum(equal, all_pairs([(1, 1)], [0])).backward()
    assert equal.grad is not None
    assert equal.grad.tolist() == [0.0, 0.0]


def test_huge_differences_stay_finite() -> None:
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry_sum(scores, all_pairs([(1, 2)], [0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4)
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, 1.0]
