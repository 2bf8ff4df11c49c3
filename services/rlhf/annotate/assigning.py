"""Who works on what: leases with fencing.

A person gets a slot of a task for `lease_s`. As long as nobody else asks, a lease that ran out changes nothing. When
somebody does, the slot is theirs: the row of the person before is `lost`, and their answer, should it still come, has
an old fence and is kept as late. UNIQUE(task, slot) and UNIQUE(task, account) hold whatever else goes wrong.

Locks are taken in one order, assignment before task, so that two transactions never wait for each other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, exists, or_, select, update
from sqlalchemy.orm import Session, aliased

from rlhf.annotate.database import Database
from rlhf.annotate.tables import ACTIVE, DONE, HELD, LOST, OPEN, SKIPPED, Account, Assignment, TaskRow
from rlhf.errors import RequestError

_RELEASED_AT_ONCE = 50
_random = secrets.SystemRandom()


@dataclass(frozen=True)
class Rules:
    """How work is given out; from the settings of the same names."""

    lease_s: float = 1800.0
    repeat_share: float = 0.05
    repeat_gap: int = 50
    gold_share: float = 0.05


def claim(database: Database, account_id: int, rules: Rules, now: float) -> Assignment | None:
    """What this person is to work on: what they hold already, or something new; None: nothing is left for them."""
    release_expired(database, now)
    with database.writing() as session:
        if not _is_active(database, session, account_id):
            return None
        held = _held_by(database, session, account_id)
        if held is not None:
            held.lease_until = now + rules.lease_s
            return held
        task = _choose(database, session, account_id, rules)
        return None if task is None else _give(session, task, account_id, now, rules.lease_s)


def renew(database: Database, account_id: int, assignment_id: int, fence: int, until: float) -> bool:
    """Keeps a task for longer; False: it is no longer this person's."""
    with database.writing() as session:
        mine = (Assignment.id == assignment_id, Assignment.account_id == account_id, Assignment.fence == fence)
        assignment = session.scalars(database.locked(select(Assignment).where(*mine))).one_or_none()
        if assignment is None or assignment.state != HELD:
            return False
        assignment.lease_until = until
        return True


def take_back(database: Database, account_id: int, assignment_id: int, now: float, lease_s: float) -> Assignment:
    """A skipped task again, if a slot of it is still free.

    Raises:
        RequestError: it is not.
    """
    with database.writing() as session:
        skipped = session.get(Assignment, assignment_id)
        if skipped is None or skipped.account_id != account_id or skipped.state != SKIPPED:
            raise RequestError("this is no task that you have skipped")
        query = select(TaskRow).where(TaskRow.seq == skipped.task_seq, OPEN)
        task = session.scalars(database.locked(query)).one_or_none()
        if task is None or _held_by(database, session, account_id) is not None:
            raise RequestError("somebody else has this task by now, or you have begun another")
        return _give(session, task, account_id, now, lease_s)


def release_expired(database: Database, now: float) -> None:
    """Frees the slots whose leases have run out, tasks in their order."""
    over = select(Assignment).where(Assignment.state == HELD, Assignment.lease_until < now)
    with database.reading() as session:
        if session.scalars(over.limit(1)).first() is None:
            return
    with database.writing() as session:
        first = over.order_by(Assignment.task_seq).limit(_RELEASED_AT_ONCE)
        for assignment in session.scalars(database.locked(first, skip=True)).all():
            free_slot(session, assignment, LOST)


def release_held(database: Database, session: Session, account_id: int) -> None:
    """Frees what a person holds."""
    held = _held_by(database, session, account_id)
    if held is not None:
        free_slot(session, held, LOST)


def free_slot(session: Session, assignment: Assignment, state: str) -> None:
    """Gives the assignment's slot back to its task; the assignment is locked."""
    assignment.state, assignment.slot = state, None
    session.flush()
    task = update(TaskRow).where(TaskRow.seq == assignment.task_seq).values(free=TaskRow.free + 1)
    session.execute(task.execution_options(synchronize_session=False))


def _is_active(database: Database, session: Session, account_id: int) -> bool:
    """Locks the account, so that a person with two windows is given one task and not two."""
    return session.scalars(database.locked(select(Account).where(Account.id == account_id))).one().state == ACTIVE


def _held_by(database: Database, session: Session, account_id: int) -> Assignment | None:
    query = select(Assignment).where(Assignment.account_id == account_id, Assignment.state == HELD)
    return session.scalars(database.locked(query.limit(1))).one_or_none()


def _choose(database: Database, session: Session, account_id: int, rules: Rules) -> TaskRow | None:
    """Locked: an ordinary task, now and then one with a known answer or one that this person has answered before."""
    draw = _random.random()
    task: TaskRow | None = None
    if draw < rules.gold_share:
        task = _next(database, session, account_id, TaskRow.source == "gold")
    elif draw < rules.gold_share + rules.repeat_share:
        task = _repeat(session, account_id, rules.repeat_gap)
    return task or _next(database, session, account_id, TaskRow.source != "gold")


def _next(database: Database, session: Session, account_id: int, kind: ColumnElement[bool]) -> TaskRow | None:
    known = exists().where(
        Assignment.task_seq == TaskRow.seq, Assignment.account_id == account_id, Assignment.state != LOST
    )
    for_me = or_(TaskRow.only_for.is_(None), TaskRow.only_for == account_id)
    query = select(TaskRow).where(OPEN, kind, for_me, ~known).order_by(TaskRow.priority.desc(), TaskRow.seq).limit(1)
    # Left out are tasks that others are being given just now, unless there are no more: then it waits for them.
    first = session.scalars(database.locked(query, skip=True)).one_or_none()
    return first or session.scalars(database.locked(query)).one_or_none()


def _repeat(session: Session, account_id: int, gap: int) -> TaskRow | None:
    """A new task that asks this person what they answered `gap` or more tasks ago; each is asked again once."""
    repeated = aliased(TaskRow)
    again = exists().where(repeated.repeats == TaskRow.id, repeated.only_for == account_id)
    query = (
        select(TaskRow)
        .join(Assignment, Assignment.task_seq == TaskRow.seq)
        .where(Assignment.account_id == account_id, Assignment.state == DONE, TaskRow.repeats.is_(None))
        .where(TaskRow.source != "gold", ~again)
        .order_by(Assignment.id.desc())
        .offset(gap)
        .limit(20)
    )
    candidates = session.scalars(query).all()
    if not candidates:
        return None
    task = _copy_for(_random.choice(candidates), account_id)
    session.add(task)
    session.flush()
    return task


def _copy_for(task: TaskRow, account_id: int) -> TaskRow:
    columns = ("kind", "prompt_id", "prompt", "details", "completions", "priority", "p_select", "reward_model")
    same: dict[str, Any] = {name: getattr(task, name) for name in (*columns, "created_at")}
    id_ = f"{task.id}:repeat:{account_id}"
    return TaskRow(**same, id=id_, need=1, free=1, fence=0, source="repeat", repeats=task.id, only_for=account_id)


def _give(session: Session, task: TaskRow, account_id: int, now: float, lease_s: float) -> Assignment:
    """A slot of the task, which is locked, to this person, for whom it is new, or was lost or skipped."""
    task.free -= 1
    task.fence += 1
    mine = select(Assignment).where(Assignment.task_seq == task.seq, Assignment.account_id == account_id)
    assignment = session.scalars(mine).one_or_none()
    if assignment is None:
        order = list(range(len(task.completions)))
        _random.shuffle(order)
        assignment = Assignment(task=task, account_id=account_id, order_shown=order, created_at=now)
        session.add(assignment)
    assignment.slot = _free_slot_of(session, task)
    assignment.state, assignment.fence, assignment.lease_until = HELD, task.fence, now + lease_s
    session.flush()
    return assignment


def _free_slot_of(session: Session, task: TaskRow) -> int:
    """The lowest number that nobody has."""
    with session.no_autoflush:
        query = select(Assignment.slot).where(Assignment.task_seq == task.seq, Assignment.slot.is_not(None))
        taken = set(session.scalars(query))
    return next(slot for slot in range(task.need) if slot not in taken)
