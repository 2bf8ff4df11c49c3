"""From a task to what its page shows, and from the form back to ranks.

The page knows replies only by their places, 0 to K - 1 in the order shown, named A, B, C. Ranks are kept in the order
of the task's completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.datastructures import FormData

from rlhf.annotate.answers import FLAGS, MAX_REASON, Answer
from rlhf.annotate.tables import Assignment, JudgmentRow
from rlhf.annotate.tasks import dense
from rlhf.annotate.web import text_of

LETTERS = "ABCDEFGHI"
STRENGTHS = ("is as good as", "is slightly better", "is better", "is much better")
MAX_MS = 24 * 3600 * 1000


class Incomplete(Exception):
    """The form lacks something; the message says what."""


@dataclass(frozen=True)
class Given:
    """What is filled in already, by place."""

    ranks: tuple[int | None, ...] = ()
    """[K]"""
    preference: int | None = None
    """-3 (A is much better) to 3 (B is much better)."""
    best: int | None = None
    worst: int | None = None
    flags: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Shown:
    """A task as its page shows it: nothing in it tells whose completions these are, or why they are asked about."""

    kind: str
    prompt: str
    replies: tuple[str, ...]
    """[K], in the order shown."""
    given: Given = field(default_factory=Given)

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.replies)]


def shown(assignment: Assignment, given: Given | None = None) -> Shown:
    texts = [completion["text"] for completion in assignment.task.completions]
    replies = tuple(texts[index] for index in assignment.order_shown)
    empty = Given(ranks=(None,) * len(texts))
    return Shown(assignment.task.kind, assignment.task.prompt, replies, given or empty)


def given_before(assignment: Assignment, row: JudgmentRow) -> Given:
    """An answer as the form had it."""
    ranks = tuple(row.ranks[index] for index in assignment.order_shown)
    preference = None
    if row.strength is not None:
        preference = row.strength if ranks[0] > ranks[1] else -row.strength
    best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
    return Given(ranks, preference, best, worst, tuple(row.flags), row.reason)


def read_given(form: FormData, count: int) -> Given:
    """What the form holds, complete or not; anything that is no choice of ours counts as not chosen."""
    return Given(
        ranks=tuple(_choice(form, f"rank-{place}", range(1, count + 1)) for place in range(count)),
        preference=_choice(form, "preference", range(-3, 4)),
        best=_choice(form, "best", range(count)),
        worst=_choice(form, "worst", range(count)),
        flags=tuple(flag for flag in FLAGS if flag in form.getlist("flag")),
        reason=text_of(form, "reason").strip()[:MAX_REASON],
    )


def read_answer(form: FormData, assignment: Assignment, guideline_version: str) -> Answer:
    """
    Raises:
        Incomplete: something has not been chosen yet.
    """
    given = read_given(form, len(assignment.order_shown))
    by_place, strength = _ranks(assignment.task.kind, given)
    ranks = [0] * len(by_place)
    for place, index in enumerate(assignment.order_shown):
        ranks[index] = by_place[place]
    return Answer(tuple(ranks), strength, given.flags, given.reason, _ms_visible(form), guideline_version)


def _ranks(kind: str, given: Given) -> tuple[tuple[int, ...], int | None]:
    """[K] ranks by place, and a pair's strength."""
    if kind == "pair":
        return _from_preference(given.preference)
    if kind == "best-worst":
        return _from_extremes(given.best, given.worst, len(given.ranks)), None
    missing = [LETTERS[place] for place, rank in enumerate(given.ranks) if rank is None]
    if missing:
        raise Incomplete(f"Reply {listed(missing)} {'has' if len(missing) == 1 else 'have'} no rank yet.")
    return dense(tuple(rank for rank in given.ranks if rank is not None)), None


def _from_preference(preference: int | None) -> tuple[tuple[int, ...], int]:
    if preference is None:
        raise Incomplete("Choose which reply is better, or that they are equally good.")
    ranks = (1, 1) if preference == 0 else (1, 2) if preference < 0 else (2, 1)
    return ranks, abs(preference)


def _from_extremes(best: int | None, worst: int | None, count: int) -> tuple[int, ...]:
    if best is None or worst is None:
        raise Incomplete(f"Choose the {'best' if best is None else 'worst'} reply.")
    if best == worst:
        raise Incomplete("The best and the worst cannot be the same reply.")
    return tuple(1 if place == best else 3 if place == worst else 2 for place in range(count))


def listed(letters: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    return " and ".join(part for part in (", ".join(letters[:-1]), letters[-1]) if part)


def _choice(form: FormData, name: str, allowed: range) -> int | None:
    value = text_of(form, name)
    is_number = value.removeprefix("-").isdecimal() and len(value) < 4
    return int(value) if is_number and int(value) in allowed else None


def _ms_visible(form: FormData) -> int | None:
    """None where the browser did not count, as without JavaScript."""
    value = text_of(form, "ms_visible")
    return min(int(value), MAX_MS) if value.isdecimal() and len(value) < 12 else None
