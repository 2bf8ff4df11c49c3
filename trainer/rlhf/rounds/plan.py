"""When the rounds of a run are, and which prompts each of them asks about: decided by the settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.data.prompts import Prompt
from rlhf.feedback.settings import FeedbackSettings


@dataclass(frozen=True)
class Planned:
    """One round. Number 0 only keeps what the initial policy says, and the last one only audits the finished policy."""

    number: int
    step: int
    """Of PPO, at which it begins."""
    candidates: Sequence[Prompt]
    audit: Sequence[Prompt]
    """The same in every round."""

    @property
    def refreshes(self) -> bool:
        """It has something to rank."""
        return bool(self.candidates)


def plan(prompts: Sequence[Prompt], its: FeedbackSettings, steps: int) -> list[Planned]:
    """Rounds 1 to `rounds`, and where there is an audit, 0 and `rounds` + 1.

    Args:
        prompts: at least one; where they do not suffice, they are asked about again.
        steps: of PPO.
    """
    order = np.random.default_rng(its.seed).permutation(len(prompts)).tolist()
    taken = 0

    def take(count: int) -> list[Prompt]:
        nonlocal taken
        taken += count
        return [prompts[order[place % len(order)]] for place in range(taken - count, taken)]

    audit = take(its.audit_pairs)
    each = round(its.prompts * its.candidates)
    rounds = [Planned(n, step_of(n, its.rounds, steps), take(each), audit) for n in range(1, its.rounds + 1)]
    if not audit:
        return rounds
    return [Planned(0, 0, [], audit), *rounds, Planned(its.rounds + 1, steps, [], audit)]


def step_of(number: int, rounds: int, steps: int) -> int:
    """Evenly spread, half a gap after the start and a whole one before the end, in which the last model is used: one
    round is after a third, three are after 1, 3 and 5 sevenths."""
    return steps * (2 * number - 1) // (2 * rounds + 1)
