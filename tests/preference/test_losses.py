"""Every ranking loss: computed at once it is its definition, its gradient is right, and it says what its name says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.preference import pairwise, ties
from rlhf.preference.crowd import crowd, kind_nlls, mixture_nll
from rlhf.preference.loss import RankingLoss
from rlhf.preference.plackett_luce import plackett_luce, plackett_luce_nll
from rlhf.preference.rankings import Ranking, Rankings, rankings_of

some_rankings = st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=5), min_size=1, max_size=4)
LOG_NU, ALPHA = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
STRENGTH = 2
WAYS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "plackett-luce": (plackett_luce, plackett_luce_nll),
    "all-pairs": (pairwise.bradley_terry, pairwise.all_pairs_nll),
    "margin": (partial(pairwise.bradley_terry_margin, margin=0.5 * STRENGTH), partial(pairwise.margin_nll, unit=0.5)),
    "scaled": (partial(pairwise.bradley_terry_scaled, strength=STRENGTH), pairwise.scaled_nll),
    "davidson": (partial(ties.davidson, log_nu=LOG_NU), partial(ties.davidson_nll, log_nu=LOG_NU)),
    "rao-kupper": (partial(ties.rao_kupper, alpha=ALPHA), partial(ties.rao_kupper_nll, alpha=ALPHA)),
}


def side_by_side(all_ranks: Sequence[Sequence[int]], seed: int = 0) -> tuple[list[Tensor], Tensor, Rankings]:
    """Scores of each ranking's completions, and the same as one rectangle."""
    generator, some, scores, first = torch.Generator().manual_seed(seed), [], [], 0
    for number, ranks in enumerate(all_ranks):
        scores.append(3 * torch.randn(len(ranks), generator=generator, dtype=torch.float64))
        items = range(first, first + len(ranks))
        some.append(Ranking(items, ranks, annotator=number, strength=STRENGTH))
        first += len(ranks)
    rankings = rankings_of(some)
    utilities = torch.where(rankings.mask, torch.cat(scores)[rankings.items], 0.0)
    return scores, utilities, rankings


@pytest.mark.parametrize("name", WAYS)
@given(all_ranks=some_rankings, seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_computed_at_once_it_is_the_definition(name: str, all_ranks: list[list[int]], seed: int) -> None:
    definition, at_once = WAYS[name]
    scores, utilities, rankings = side_by_side(all_ranks, seed)
    expected = torch.stack([definition(own, ranks) for own, ranks in zip(scores, all_ranks, strict=True)])
    torch.testing.assert_close(at_once(utilities, rankings), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", WAYS)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    _, utilities, rankings = side_by_side([(1, 2, 2, 3), (1, 1), (2, 1, 3, 1, 1), (1, 1, 1)])
    at_once = WAYS[name][1]
    assert torch.autograd.gradcheck(lambda u: at_once(u, rankings), utilities.requires_grad_())


@pytest.mark.parametrize("name", ["davidson", "rao-kupper"])
def test_gradient_of_the_tie_parameter(name: str) -> None:
    _, utilities, rankings = side_by_side([(1, 2, 2, 3), (1, 1)])
    at_once = ties.davidson_nll if name == "davidson" else ties.rao_kupper_nll
    parameter = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: at_once(utilities, rankings, p), parameter)


@pytest.mark.parametrize("name", ["plackett-luce", "all-pairs", "davidson", "rao-kupper"])
def test_ranking_counts_as_much_as_it_orders(name: str) -> None:
    """Weights are K - 1, of a strict ranking and of one with ties, and pad entries count nothing."""
    _, _, rankings = side_by_side([(1, 2), (1, 2, 3, 4, 5), (1, 1, 2)])
    assert RankingLoss(name).weights(rankings).tolist() == [1.0, 4.0, 2.0]  # type: ignore[arg-type]


def test_every_loss_by_name_is_finite_far_out_and_has_a_gradient() -> None:
    _, utilities, rankings = side_by_side([(1, 2, 2), (3, 2, 1)])
    for name in WAYS:
        far = (1e4 * utilities.float()).requires_grad_()
        loss = RankingLoss(name)(far, rankings).sum()  # type: ignore[arg-type]
        loss.backward()
        assert far.grad is not None
        assert math.isfinite(float(loss.detach())), name
        assert bool(far.grad.isfinite().all()), name


def test_one_pair_is_minus_log_sigmoid_under_plackett_luce_and_all_pairs() -> None:
    for definition in (plackett_luce, pairwise.bradley_terry):
        loss = definition(torch.tensor([2.0, 0.5]), (1, 2))
        assert float(loss) == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))


def test_plackett_luce_adds_up_to_one_over_all_orders() -> None:
    utilities = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    orders = itertools.permutations((1, 2, 3, 4))
    assert float(sum(torch.exp(-plackett_luce(utilities, ranks)) for ranks in orders)) == pytest.approx(1)


def test_tied_and_equal_is_the_mean_over_the_orders_of_the_tied() -> None:
    """Efron's form is exact there; Breslow's would not be."""
    utilities = torch.tensor([0.7, 0.7, 0.7, -0.4], dtype=torch.float64)
    orders = [plackett_luce(utilities, (*some, 4)) for some in itertools.permutations((1, 2, 3))]
    mean = torch.exp(-torch.stack(orders)).mean()
    assert float(torch.exp(-plackett_luce(utilities, (1, 1, 1, 2)))) == pytest.approx(float(mean))


def test_two_tied_are_rao_and_kuppers_tie_without_a_threshold() -> None:
    utilities = torch.tensor([1.3, 0.2], dtype=torch.float64)
    both = (
        torch.nn.functional.logsigmoid(utilities[0] - utilities[1]),
        torch.nn.functional.logsigmoid(utilities[1] - utilities[0]),
    )
    assert float(plackett_luce(utilities, (1, 1))) == pytest.approx(float(-sum(both)) - math.log(2))


@pytest.mark.parametrize("name", ["davidson", "rao-kupper"])
def test_three_outcomes_add_up_to_one_and_a_fresh_parameter_gives_a_tie_one_third(name: str) -> None:
    loss = RankingLoss(name).double()  # type: ignore[arg-type]
    for difference in (0.0, 1.7):
        utilities = torch.tensor([[difference, 0.0]], dtype=torch.float64)
        outcomes = [rankings_of([Ranking((0, 1), ranks)]) for ranks in ((1, 2), (2, 1), (1, 1))]
        chances = [float(torch.exp(-loss(utilities, one)).detach()) for one in outcomes]
        assert sum(chances) == pytest.approx(1)
        if difference == 0:
            assert chances[2] == pytest.approx(1 / 3, abs=0.01)


def test_tie_pulls_together_what_a_margin_pushes_apart() -> None:
    for name in WAYS:
        utilities = torch.tensor([[1.0, -1.0]], requires_grad=True)
        RankingLoss(name)(utilities, rankings_of([Ranking((0, 1), (1, 1))])).sum().backward()  # type: ignore[arg-type]
        assert utilities.grad is not None
        assert float(utilities.grad[0, 0]) > 0 > float(utilities.grad[0, 1]), name
    strong = rankings_of([Ranking((0, 1), (1, 2), strength=3)])
    utilities = torch.tensor([[0.5, 0.0]])
    assert float(RankingLoss("margin", 1.0)(utilities, strong)) > float(RankingLoss("margin", 0.0)(utilities, strong))


def test_mixture_of_kinds_is_its_definition() -> None:
    _, utilities, rankings = side_by_side([(1, 2, 2, 3), (2, 1), (3, 1, 2)])
    kinds = ("honest", "adversarial", "random")
    shares = torch.tensor([[0.7, 0.2, 0.1]] * 3, dtype=torch.float64)
    nlls = kind_nlls(kinds, RankingLoss(), utilities, rankings)
    expected = [crowd(list(own), list(share)) for own, share in zip(nlls, shares, strict=True)]
    torch.testing.assert_close(mixture_nll(nlls, shares.log()), torch.stack(expected))
    assert torch.autograd.gradcheck(
        lambda u: mixture_nll(kind_nlls(kinds, RankingLoss(), u, rankings), shares.log()), utilities.requires_grad_()
    )


def test_mixture_over_one_pair_is_crowd_bt() -> None:
    utilities, rankings = torch.tensor([[1.2, 0.0]]), rankings_of([Ranking((0, 1), (1, 2))])
    shares = torch.tensor([[0.6, 0.1, 0.3]])
    nll = mixture_nll(kind_nlls(("honest", "adversarial", "random"), RankingLoss(), utilities, rankings), shares.log())
    eta, sigmoid = 0.6 + 0.3 / 2, 1 / (1 + math.exp(-1.2))
    assert float(nll) == pytest.approx(-math.log(eta * sigmoid + (1 - eta) * (1 - sigmoid)))


def test_upside_down_ranks() -> None:
    rankings = rankings_of([Ranking((0, 1, 2), (1, 2, 2)), Ranking((0, 1), (2, 1))])
    assert rankings.reversed().ranks[0].tolist() == [2, 1, 1]
    assert rankings.reversed().ranks[1, :2].tolist() == [1, 2]


def test_places_run_from_minus_a_half_to_a_half() -> None:
    rankings = rankings_of([Ranking((5, 6, 7), (1, 2, 3), order_shown=(2, 0, 1)), Ranking((0, 1), (1, 2))])
    assert rankings.places[0].tolist() == [0.0, 0.5, -0.5]
    assert rankings.places[1].tolist() == [0.0, 0.0, 0.0]
