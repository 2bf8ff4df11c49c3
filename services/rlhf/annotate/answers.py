"""Answers: submitting them once and only once, changing them, skipping.

An answer is acknowledged after its transaction is durable. The key of the form makes a second submit of it harmless;
the fence says whether the task was still this person's; both are checked where the row is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rlhf.annotate.assigning import free_slot
from rlhf.annotate.database import Database
from rlhf.annotate.tables import DONE, HELD, LATE, SKIPPED, Assignment, JudgmentRow, Skip
from rlhf.errors import Overloaded, RequestError

FLAGS = {
    "all-bad": "All replies are bad",
    "unclear": "The prompt is unclear",
    "broken": "Text is cut off or garbled",
    "harmful": "Harmful or private content",
    "other-language": "A language I cannot judge",
}
"""What can be marked, by the name it is kept under."""
MAX_REASON = 2000


class Conflict(RequestError):
    """Something else has been saved for this task already. `assignment_id` says where it can be seen."""

    def __init__(self, message: str, assignment_id: int) -> None:
        super().__init__(message)
        self.assignment_id = assignment_id


@dataclass(frozen=True)
class Form:
    """What every submit carries."""

    assignment_id: int
    fence: int
    """Of the assignment when the form was made."""
    key: str
    """Of this form: a second submit with it is the same submit."""


@dataclass(frozen=True)
class Answer:
    ranks: tuple[int, ...]
    """[K], in the order of the task's completions, whatever order was shown."""
    strength: int | None = None
    flags: tuple[str, ...] = ()
    reason: str = ""
    ms_visible: int | None = None
    guideline_version: str = ""


@dataclass(frozen=True)
class Receipt:
    """An acknowledgement."""

    judgment_id: int
    late: bool
    again: bool
    """It had been saved before."""


def submit(
    database: Database, account_id: int, form: Form, answer: Answer, *, revision: int, now: float, per_minute: int
) -> Receipt:
    """Saves an answer for good.

    Args:
        revision: how many answers of this person to this task there are already, as the form knew.
        per_minute: as many answers of one person are taken in a minute.

    Raises:
        RequestError: the task is not this person's.
        Conflict: another answer has been saved in the meantime.
        Overloaded: too many within a minute.
    """
    try:
        with database.writing() as session:
            assignment = _mine(database, session, account_id, form)
            saved = session.scalars(select(JudgmentRow).where(JudgmentRow.key == form.key)).one_or_none()
            if saved is not None:
                return _same(saved, assignment, answer)
            _check_rate(session, account_id, now, per_minute)
            _check_revision(session, assignment, revision)
            return _save(session, assignment, form, answer, revision, now)
    except IntegrityError as error:
        raise Conflict("another answer to this was saved at the same moment", form.assignment_id) from error


def skip(database: Database, account_id: int, form: Form, *, flags: Sequence[str], reason: str, now: float) -> None:
    """Notes that a person passes, and gives the task to somebody else. Doing it again changes nothing.

    Raises:
        RequestError: the task is not this person's.
        Conflict: this person has answered it.
    """
    with database.writing() as session:
        assignment = _mine(database, session, account_id, form)
        if session.scalars(select(Skip.id).where(Skip.key == form.key)).one_or_none() is not None:
            return
        if assignment.state == DONE:
            raise Conflict("you have answered this task already", assignment.id)
        row = Skip(assignment_id=assignment.id, account_id=account_id, key=form.key, created_at=now)
        row.flags, row.reason = list(flags), reason[:MAX_REASON]
        session.add(row)
        if assignment.state == HELD and assignment.fence == form.fence:
            free_slot(session, assignment, SKIPPED)


def answers_of(session: Session, account_id: int, assignment_id: int) -> list[JudgmentRow]:
    """All revisions of a person's answer to a task, newest first; none of anybody else's."""
    mine = (JudgmentRow.account_id == account_id, JudgmentRow.assignment_id == assignment_id)
    return list(session.scalars(select(JudgmentRow).where(*mine).order_by(JudgmentRow.revision.desc())))


def recent(session: Session, account_id: int, limit: int = 20) -> list[Assignment]:
    """What a person has answered or skipped, newest first."""
    last = (
        select(func.max(JudgmentRow.created_at))
        .where(JudgmentRow.assignment_id == Assignment.id)
        .correlate(Assignment)
        .scalar_subquery()
    )
    skipped = (
        select(func.max(Skip.created_at)).where(Skip.assignment_id == Assignment.id).correlate(Assignment)
    ).scalar_subquery()
    query = (
        select(Assignment)
        .where(Assignment.account_id == account_id, Assignment.state.in_((DONE, LATE, SKIPPED)))
        .order_by(func.coalesce(last, skipped).desc(), Assignment.id.desc())
        .limit(limit)
    )
    return list(session.scalars(query))


def _mine(database: Database, session: Session, account_id: int, form: Form) -> Assignment:
    query = select(Assignment).where(Assignment.id == form.assignment_id, Assignment.account_id == account_id)
    assignment = session.scalars(database.locked(query)).one_or_none()
    if assignment is None:
        raise RequestError("this task was not given to you")
    return assignment


def _same(saved: JudgmentRow, assignment: Assignment, answer: Answer) -> Receipt:
    """The first acknowledgement once more, unless the form was changed after it."""
    is_other = (tuple(saved.ranks), saved.strength, tuple(saved.flags), saved.reason) != (
        answer.ranks,
        answer.strength,
        answer.flags,
        answer.reason[:MAX_REASON],
    )
    if saved.assignment_id != assignment.id or is_other:
        raise Conflict("an earlier answer from this form was saved; the change after it was not", assignment.id)
    return Receipt(saved.id, saved.late, again=True)


def _check_rate(session: Session, account_id: int, now: float, per_minute: int) -> None:
    of_last_minute = (JudgmentRow.account_id == account_id, JudgmentRow.created_at > now - 60)
    if session.scalars(select(func.count()).where(*of_last_minute)).one() >= per_minute:
        raise Overloaded(f"more than {per_minute} answers in a minute; wait a moment", retry_after_s=10.0)


def _check_revision(session: Session, assignment: Assignment, revision: int) -> None:
    there = session.scalars(select(func.count()).where(JudgmentRow.assignment_id == assignment.id)).one()
    if there != revision:
        raise Conflict("you have answered this task already", assignment.id)


def _save(session: Session, assignment: Assignment, form: Form, answer: Answer, revision: int, now: float) -> Receipt:
    in_time = assignment.fence == form.fence and assignment.state in (HELD, DONE)
    fields = asdict(answer) | {"ranks": list(answer.ranks), "flags": list(answer.flags)}
    fields["reason"] = answer.reason[:MAX_REASON]
    row = JudgmentRow(**fields, assignment_id=assignment.id, account_id=assignment.account_id, key=form.key)
    row.revision, row.fence, row.late, row.created_at = revision, form.fence, not in_time, now
    session.add(row)
    if assignment.state != DONE:
        assignment.state = DONE if in_time else LATE
    session.flush()
    return Receipt(row.id, row.late, again=False)
