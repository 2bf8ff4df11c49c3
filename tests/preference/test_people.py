"""Annotators: what is learnt of them with the rewards, and what gold and repeats say of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.errors import DataError
from rlhf.feedback.judgments import CompletionShown, Judgment
from rlhf.preference.crowd import Annotators
from rlhf.preference.loss import RankingLoss
from rlhf.preference.people import evidence_of, groups_of
from rlhf.preference.rankings import Ranking, Rankings, rankings_of
from rlhf.preference.reliability import Count, Evidence


def judgment(number: int, ranks: Sequence[int], **changes: object) -> Judgment:
    own = Judgment(
        judgment_id=f"j{number}",
        task_id=str(number),
        prompt="p",
        completions=tuple(CompletionShown(text) for text in "abcd"[: len(ranks)]),
        ranks=tuple(ranks),
        annotator="x",
        source="random",
    )
    return replace(own, **changes)  # type: ignore[arg-type]


def people(fit: float, gold: float, repeats: float, rankings: int = 60, asked: int = 4) -> Evidence:
    """Rates of being right, over as many rankings of four as in a session, and 4 gold and 4 repeats."""
    return Evidence(
        Count(3 * rankings * fit, 3 * rankings), *(Count(3 * asked * r, 3 * asked) for r in (gold, repeats))
    )


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (people(0.8, 1.0, 0.8), "honest"),
        (people(0.5, 1.0, 0.8), "dissenting"),
        (people(0.3, 0.95, 0.8), "dissenting"),
        (people(0.5, 0.5, 0.5), "random"),
        (people(0.2, 0.0, 0.8), "adversarial"),
    ],
)
def test_gold_and_repeats_tell_the_careless_from_the_dissenting(evidence: Evidence, expected: str) -> None:
    assert evidence.verdict() == expected
    assert sum(evidence.probabilities().values()) == pytest.approx(1)


def test_without_gold_and_repeats_nobody_who_does_not_fit_is_called_anything() -> None:
    assert people(0.8, 0, 0, asked=0).verdict() == "honest"
    assert people(0.52, 0, 0, asked=0).verdict() == "undecided"
    assert Evidence().verdict() == "undecided"


def test_interval_of_a_rate_is_that_of_the_beta_distribution() -> None:
    low, high = Count(8, 10).interval()
    # scipy.stats.beta.ppf([.025, .975], 8.5, 2.5)
    assert (low, high) == (pytest.approx(0.4973, abs=2e-3), pytest.approx(0.9559, abs=2e-3))
    wide, narrow = Count(4, 5).interval(), Count(400, 500).interval()
    assert narrow[1] - narrow[0] < 0.1 < wide[1] - wide[0]


def test_evidence_counts_fit_gold_and_repeats_in_independent_pairs() -> None:
    rows = [
        judgment(0, (1, 2, 3)),
        judgment(1, (3, 2, 1), source="repeat"),
        judgment(2, (1, 1), source="gold", metadata={"gold_ranks": "[1, 2]"}),
        judgment(3, (2, 1), source="gold", metadata={"gold_ranks": "[2, 1]"}),
    ]
    scores = [np.array([3.0, 2.0, 1.0])] * 2 + [np.array([1.0, 0.0])] * 2
    found = evidence_of(rows, scores)["x"]
    # Of three, three pairs weigh two; the upside-down repeat is all wrong; a tie says nothing.
    assert (found.fit.right, found.fit.of) == (pytest.approx(2.0), pytest.approx(2 + 2 + 1))
    assert (found.repeats.right, found.repeats.of) == (0.0, pytest.approx(2.0))
    assert (found.gold.right, found.gold.of) == (1.0, 1.0)


def test_repeat_in_another_order_is_compared_by_text() -> None:
    again = judgment(1, (3, 1, 2), source="repeat", completions=tuple(CompletionShown(text) for text in "cab"))
    found = evidence_of([judgment(0, (1, 2, 3)), again], [np.zeros(3)] * 2)["x"]
    assert found.repeats.right == found.repeats.of == pytest.approx(2.0)


def test_gold_must_say_what_is_right() -> None:
    for metadata in ({}, {"gold_ranks": "best"}, {"gold_ranks": "[1]"}):
        with pytest.raises(DataError, match="gold_ranks"):
            evidence_of([judgment(7, (1, 2), source="gold", metadata=metadata)], [np.zeros(2)])
    good = {"gold_ranks": json.dumps([1, 2])}
    assert evidence_of([judgment(7, (1, 2), source="gold", metadata=good)], [np.zeros(2)])["x"].gold.right == 1


def rankings_by(kinds: Sequence[str], per: int = 40) -> tuple[Rankings, torch.Tensor]:
    """Of four completions with utilities that are known: who is honest, upside down, or clicks."""
    rng = np.random.default_rng(0)
    utilities, some = [], []
    for annotator, kind in enumerate(kinds):
        for _ in range(per):
            true = 2 * rng.normal(size=4)
            seen = rng.gumbel(size=4) + (0 if kind == "random" else true)
            order = tuple(rng.permutation(4).tolist())
            if kind == "position":
                seen[list(order)] -= np.arange(4)
            ranks = np.argsort(np.argsort(seen if kind == "adversarial" else -seen)) + 1
            some.append(Ranking(range(len(utilities), len(utilities) + 4), ranks.tolist(), annotator, order))
            utilities += true.tolist()
    return rankings_of(some), torch.tensor(utilities, dtype=torch.float32)


def fitted(kinds: Sequence[str], **parts: bool) -> Annotators:
    rankings, utilities = rankings_by(kinds)
    people, loss = Annotators(len(kinds), lr=0.01, **parts), RankingLoss()  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(people.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        (people(loss, rankings.utilities(utilities), None, rankings).sum() + people.penalty()).backward()
        optimizer.step()
    return people


def test_shares_of_kinds_are_recovered() -> None:
    kinds = ("honest", "adversarial", "random")
    shares = fitted(kinds).log_shares.exp().detach()
    assert shares.argmax(1).tolist() == [0, 1, 2]
    assert (shares.amax(1) > 0.6).all()


def test_place_bias_is_recovered() -> None:
    bias = fitted(("honest", "honest", "position"), reliability=True, position_bias=True).place_bias.detach()
    assert abs(float(bias[0])) < 1
    assert float(bias[2]) == pytest.approx(-3, abs=1.2)  # a unit a place, from the first to the fourth


def test_with_tastes_there_is_no_adversarial_kind() -> None:
    assert Annotators(3, rank=2).kinds == ("honest", "random")
    assert Annotators(3, rank=2).tastes.shape == (3, 2)


def test_steps_of_shares_do_not_depend_on_the_learning_rate() -> None:
    moved = []
    for lr in (1e-2, 1e-5):
        people = Annotators(1, lr=lr)
        optimizer = torch.optim.Adam(people.parameters(), lr=lr)
        (-people.log_shares[0, 1]).backward()
        optimizer.step()
        moved.append(people.log_shares.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-4)


def test_people_of_like_taste_form_groups_without_the_bad() -> None:
    tastes = np.array([[1.0, 0], [1.1, 0], [0.9, 0.1], [-1, 0.1], [-1.1, 0], [9, 9]])
    names = list("abcdef")
    groups = groups_of(tastes, np.eye(2), np.ones(6), names, {"f": "random"}, 2)
    assert len({groups.of[name] for name in "abc"}) == len({groups.of[name] for name in "de"}) == 1
    assert "f" not in groups.of
    assert sorted(groups.shares.tolist()) == pytest.approx([0.4, 0.6])
    assert groups.centres[groups.of["d"]] == pytest.approx([-1.05, 0.05])
    unseen = groups_of(tastes[:2], np.zeros((2, 2)), np.ones(2), ["a", "b"], {}, 2)
    assert unseen.shares.tolist() == [1.0], "tastes that change no reward are one group"
