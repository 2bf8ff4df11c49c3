"""How far the work is: one person's, and everybody's."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select

from rlhf.annotate.database import Database
from rlhf.annotate.store import OWN_SOURCES
from rlhf.annotate.tables import DONE, Assignment, JudgmentRow, TaskRow

_DAY_S = 24 * 3600.0
_FRESH_S = 5.0


@dataclass(frozen=True)
class Own:
    """Of one person."""

    today: int
    """Answers in the last 24 hours."""
    total: int


@dataclass(frozen=True)
class Everybodys:
    answered: int
    needed: int


def own_progress(database: Database, account_id: int, now: float) -> Own:
    mine = (JudgmentRow.account_id == account_id, JudgmentRow.revision == 0)
    with database.reading() as session:
        total = session.scalars(select(func.count()).where(*mine)).one()
        today = session.scalars(select(func.count()).where(*mine, JudgmentRow.created_at > now - _DAY_S)).one()
    return Own(today, total)


class Board:
    """Everybody's progress, counted anew every few seconds: it is on every page and looks at every task."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counted = Everybodys(0, 0)
        self._counted_at = float("-inf")

    def __call__(self, now: float) -> Everybodys:
        if not 0 <= now - self._counted_at < _FRESH_S:
            self._counted, self._counted_at = self._count(), now
        return self._counted

    def _count(self) -> Everybodys:
        asked = (TaskRow.source.not_in(OWN_SOURCES), TaskRow.closed.is_(False))
        needed = select(func.coalesce(func.sum(TaskRow.need), 0)).where(*asked)
        done = select(func.count()).select_from(Assignment).join(TaskRow)
        done = done.where(*asked, Assignment.state == DONE, Assignment.slot.is_not(None))
        with self._database.reading() as session:
            return Everybodys(session.scalars(done).one(), session.scalars(needed).one())
