"""What the lead looks at: how far people agree with a settled answer, with each other and with themselves.

Someone who clicks at random disagrees with all three. Someone with other values than the rest agrees with themselves
and with the settled answers, and not with others: that is no reason to leave them out.

Intervals are Wilson's, 95 %, and take pairs of replies for independent; those of one task are not quite, so the true
ones are somewhat wider.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from statistics import median

from sqlalchemy import func, select

from rlhf.annotate.store import Counts, Store
from rlhf.annotate.tables import Account, Skip, TaskRow
from rlhf.feedback.agreement import ordered_pairs, pair_agreement_alpha, pairwise_agreement
from rlhf.feedback.judgments import Judgment

_Z = 1.959964
_DAYS = 14
_SHOWN = 20
_GOLD = "\0gold"


@dataclass(frozen=True)
class Share:
    """`hits` of `count`, with its interval."""

    hits: float
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def low(self) -> float:
        return self._wilson(-1)

    @property
    def high(self) -> float:
        return self._wilson(1)

    def _wilson(self, sign: int) -> float:
        """E. B. Wilson, Probable Inference (1927)."""
        if not self.count:
            return 0.0 if sign < 0 else 1.0
        n, p = self.count, self.value
        middle, half = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return min(1.0, max(0.0, (middle + sign * half) / (1 + _Z**2 / n)))


@dataclass(frozen=True)
class Reliability:
    """One person's."""

    account: Account
    answers: int
    skips: int
    median_s: float | None
    """Time with a task before their eyes."""
    with_gold: Share
    with_others: Share
    with_self: Share
    first: Share
    """How often the reply that was shown first is ranked first, a tie shared out."""
    first_expected: float

    @property
    def prefers_first(self) -> bool:
        return self.first.count >= 20 and not self.first.low <= self.first_expected <= self.first.high


@dataclass(frozen=True)
class Position:
    """A place in the order shown."""

    letter: str
    best: Share
    expected: float


@dataclass(frozen=True)
class Disagreement:
    task_id: str
    prompt: str
    answers: int
    opposed: Share
    """Pairs of replies that two people ordered in opposite ways."""


@dataclass(frozen=True)
class Report:
    counts: Counts
    by_version: list[tuple[str, int, int]]
    """Policy version, answers, answers needed."""
    by_day: list[tuple[str, int]]
    """Answers on each of the last days, oldest first."""
    alpha: float | None
    pairwise: float | None
    people: list[Reliability]
    positions: list[Position]
    disagreements: list[Disagreement]


def report(store: Store, now: float) -> Report:
    judgments = store.judgments()
    asked = [each for each in judgments if each.source != "repeat"]
    return Report(
        counts=store.counts(),
        by_version=_by_version(store, asked),
        by_day=_by_day(judgments, now),
        alpha=pair_agreement_alpha(asked),
        pairwise=pairwise_agreement(asked),
        people=_people(store, judgments),
        positions=_positions(judgments),
        disagreements=disagreements(asked),
    )


def disagreements(judgments: Iterable[Judgment]) -> list[Disagreement]:
    """Tasks about which people disagree most, worst first."""
    by_task: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_task[judgment.task_id].append(judgment)
    found = [
        Disagreement(task_id, group[0].prompt, len(group), _opposed(group))
        for task_id, group in by_task.items()
        if len(group) > 1
    ]
    found = [each for each in found if each.opposed.hits]
    return sorted(found, key=lambda each: (-each.opposed.value, -each.opposed.hits))[:_SHOWN]


def _opposed(group: Sequence[Judgment]) -> Share:
    pairs = [
        first == -second
        for votes in _votes(group).values()
        for (_, first), (_, second) in combinations(votes, 2)
        if first and second
    ]
    return Share(sum(pairs), len(pairs))


def _people(store: Store, judgments: Sequence[Judgment]) -> list[Reliability]:
    with store.database.reading() as session:
        accounts = session.scalars(select(Account).order_by(Account.state, Account.name)).all()
        skips: dict[int, int] = dict(
            session.execute(select(Skip.account_id, func.count()).group_by(Skip.account_id)).all()
        )
    gold, others, selves = _with_gold(store, judgments), _with_others(judgments), _with_self(judgments)
    mine: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        mine[judgment.annotator].append(judgment)
    return [
        Reliability(
            account=account,
            answers=len(mine[account.pseudonym]),
            skips=skips.get(account.id, 0),
            median_s=_median_s(mine[account.pseudonym]),
            with_gold=gold[account.pseudonym],
            with_others=others[account.pseudonym],
            with_self=selves[account.pseudonym],
            first=_best_at(mine[account.pseudonym], 0),
            first_expected=_expected_at(mine[account.pseudonym], 0),
        )
        for account in accounts
    ]


def _with_gold(store: Store, judgments: Iterable[Judgment]) -> dict[str, Share]:
    right = store.gold()
    hits: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for judgment in judgments:
        if judgment.task_id in right:
            settled = replace(judgment, annotator=_GOLD, ranks=right[judgment.task_id])
            for (_, given), (_, expected) in _votes([judgment, settled]).values():
                counts[judgment.annotator] += expected != 0
                hits[judgment.annotator] += expected != 0 and given == expected
    return _shares(hits, counts)


def _with_others(judgments: Iterable[Judgment]) -> dict[str, Share]:
    """Over pairs of replies that both ordered."""
    hits: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for votes in _votes(each for each in judgments if each.source != "repeat").values():
        for (one, first), (other, second) in combinations(votes, 2):
            if one != other and first and second:
                for who in (one, other):
                    counts[who] += 1
                    hits[who] += first == second
    return _shares(hits, counts)


def _with_self(judgments: Iterable[Judgment]) -> dict[str, Share]:
    """Over pairs of replies that somebody was asked about twice; a tie agrees with a tie."""
    hits: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for votes in _votes(judgments).values():
        for (one, first), (other, second) in combinations(votes, 2):
            if one == other:
                counts[one] += 1
                hits[one] += first == second
    return _shares(hits, counts)


def _votes(judgments: Iterable[Judgment]) -> dict[tuple[str, str, str], list[tuple[str, int]]]:
    """For each two texts under one prompt: who preferred which, as often as they were asked."""
    votes: dict[tuple[str, str, str], list[tuple[str, int]]] = defaultdict(list)
    for judgment in judgments:
        for first, second, vote in ordered_pairs(judgment):
            votes[judgment.prompt_id, first, second].append((judgment.annotator, vote))
    return votes


def _shares(hits: Counter[str], counts: Counter[str]) -> dict[str, Share]:
    shares: dict[str, Share] = defaultdict(lambda: Share(0, 0))
    shares.update({who: Share(hits[who], counts[who]) for who in counts})
    return shares


def _positions(judgments: Sequence[Judgment]) -> list[Position]:
    most = max((len(each.ranks) for each in judgments), default=0)
    return [
        Position("ABCDEFGHI"[place], _best_at(judgments, place), _expected_at(judgments, place))
        for place in range(most)
    ]


def _best_at(judgments: Iterable[Judgment], place: int) -> Share:
    credits = [
        (each.ranks[each.order_shown[place]] == 1) / each.ranks.count(1)
        for each in judgments
        if place < len(each.order_shown)
    ]
    return Share(sum(credits), len(credits))


def _expected_at(judgments: Iterable[Judgment], place: int) -> float:
    """What it would be if the place had no influence."""
    counts = [len(each.ranks) for each in judgments if place < len(each.ranks)]
    return sum(1 / count for count in counts) / len(counts) if counts else math.nan


def _median_s(judgments: Iterable[Judgment]) -> float | None:
    times = [each.ms_visible / 1000 for each in judgments if each.ms_visible is not None]
    return median(times) if times else None


def _by_day(judgments: Iterable[Judgment], now: float) -> list[tuple[str, int]]:
    days = [datetime.fromtimestamp(now - 86400 * back, UTC).date().isoformat() for back in reversed(range(_DAYS))]
    counts = Counter(each.created_at[:10] for each in judgments)
    return [(day, counts[day]) for day in days]


def _by_version(store: Store, judgments: Iterable[Judgment]) -> list[tuple[str, int, int]]:
    answered = Counter(each.policy_version for each in judgments if each.source != "gold")
    needed: Counter[str] = Counter()
    with store.database.reading() as session:
        query = select(TaskRow.completions, TaskRow.need).where(
            TaskRow.source.not_in(("gold", "repeat")), TaskRow.closed.is_(False)
        )
        for completions, need in session.execute(query):
            versions = {each["policy_version"] for each in completions}
            needed[versions.pop() if len(versions) == 1 else "mixed"] += need
    names = sorted(answered.keys() | needed.keys())
    return [(name, answered[name], needed[name]) for name in names]
