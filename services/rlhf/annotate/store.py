"""What other parts use of the page: tasks in, judgments out. Any number of processes may hold one database.

store = Store("sqlite:///runs/demo/annotate.db")
ids = store.add_tasks([Task(prompt, completions, need=2)])
store.counts(ids).remaining        # 0 once everybody has answered
store.judgments(ids)
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, Select, func, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from rlhf.annotate.database import Database
from rlhf.annotate.tables import (
    ACTIVE,
    DONE,
    HELD,
    LATE,
    SKIPPED,
    WITHDRAWN,
    Account,
    Assignment,
    JudgmentRow,
    Skip,
    TaskRow,
)
from rlhf.annotate.tasks import Task
from rlhf.errors import StorageError
from rlhf.feedback.judgments import GOLD_RANKS, CompletionShown, Judgment, Source, prompt_id_of
from rlhf.settings.run import Settings

_AT_ONCE = 500
"""Ids in one query; databases bound how many a query may hold."""
OWN_SOURCES = ("gold", "repeat")
"""Asked to know the annotators; nobody waits for these."""


@dataclass(frozen=True)
class Counts:
    """How far the work is; gold and repeated tasks are left out of all but `judgments`."""

    tasks: int
    answers_needed: int
    """Over all tasks that are not closed."""
    answers: int
    """That count towards these."""
    held: int
    """Open before somebody's eyes."""
    skipped: int
    late: int
    judgments: int
    """Rows, earlier revisions and all."""

    @property
    def remaining(self) -> int:
        return max(0, self.answers_needed - self.answers)


class Store:
    def __init__(self, url: str) -> None:
        """
        Args:
            url: `sqlite:///FILE` or `postgresql+psycopg://…`; tables are made or migrated.

        Raises:
            SettingsError, StorageError, Unavailable: as `Database`.
        """
        self.database = Database(url)

    def close(self) -> None:
        self.database.close()

    def add_tasks(self, tasks: Iterable[Task]) -> list[str]:
        """Adds those that are not there yet, all or none, and returns the ids of all."""
        tasks = list(tasks)
        try:
            self._add_new(tasks)
        except IntegrityError:
            # Another process added one of them at the same moment; now it can be seen.
            self._add_new(tasks)
        return [task.task_id for task in tasks]

    def _add_new(self, tasks: Sequence[Task]) -> None:
        with self.database.writing() as session:
            known = {id_ for ids in _batches([task.task_id for task in tasks]) for id_ in _known(session, ids)}
            new = {task.task_id: task for task in tasks if task.task_id not in known}
            session.add_all([_row(task) for task in new.values()])

    def close_tasks(self, task_ids: Sequence[str]) -> None:
        """Nobody is given these any more; whoever holds one may still answer."""
        with self.database.writing() as session:
            for ids in _batches(task_ids):
                session.execute(update(TaskRow).where(TaskRow.id.in_(ids)).values(closed=True))

    def judgments(
        self, task_ids: Sequence[str] | None = None, *, all_revisions: bool = False, late: bool = False
    ) -> list[Judgment]:
        """What people answered, oldest first, without those who withdrew.

        Args:
            task_ids: of these tasks; None: of all.
            all_revisions: also what somebody changed later.
            late: also answers that came after somebody else had been given the task.
        """
        query = _answers(all_revisions, late)
        with self.database.reading() as session:
            if task_ids is None:
                return [judgment_of(row, name) for row, name in session.execute(query)]
            parts = (session.execute(query.where(TaskRow.id.in_(ids))) for ids in _batches(task_ids))
            return [judgment_of(row, name) for part in parts for row, name in part]

    def gold(self) -> dict[str, tuple[int, ...]]:
        """The right ranks of each gold task, by its id."""
        with self.database.reading() as session:
            rows = session.execute(select(TaskRow.id, TaskRow.gold_ranks).where(TaskRow.source == "gold"))
            return {id_: tuple(ranks or ()) for id_, ranks in rows}

    def counts(self, task_ids: Sequence[str] | None = None) -> Counts:
        with self.database.reading() as session:
            if task_ids is None:
                return _counts(session, true())
            parts = [_counts(session, TaskRow.id.in_(ids)) for ids in _batches(task_ids)]
            columns = zip(*(asdict(part).values() for part in parts), strict=True)
            return Counts(*map(sum, columns)) if parts else Counts(0, 0, 0, 0, 0, 0, 0)

    def passed(self, task_ids: Sequence[str]) -> int:
        """Answers to these that nobody is left to give: the task was skipped, and everybody who is at work on these
        has skipped or answered it."""
        with self.database.reading() as session:
            chosen = [TaskRow.id.in_(ids) for ids in _batches(task_ids)]
            at_work = {id_ for some in chosen for id_ in session.scalars(_at_work(some))}
            return sum(session.scalars(_passed(some, at_work)).one() for some in chosen)


def open_store(settings: Settings) -> Store:
    """The run's store, made if it is not there."""
    url = settings.annotate.database
    if not url:
        try:
            settings.paths.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{settings.paths.folder} cannot be made: {error.strerror}") from error
        url = f"sqlite:///{settings.paths.annotations.absolute()}"
    return Store(url)


def judgment_of(row: JudgmentRow, pseudonym: str) -> Judgment:
    """A row in the native form."""
    assignment, task = row.assignment, row.assignment.task
    return Judgment(
        judgment_id=f"{task.id}.{pseudonym}.{row.revision}",
        task_id=task.id,
        prompt_id=task.prompt_id,
        prompt=task.prompt,
        metadata=task.details if task.gold_ranks is None else {**task.details, GOLD_RANKS: json.dumps(task.gold_ranks)},
        completions=tuple(CompletionShown(**each) for each in task.completions),
        ranks=tuple(row.ranks),
        order_shown=tuple(assignment.order_shown),
        annotator=pseudonym,
        source=cast(Source, task.source),
        p_select=task.p_select,
        strength=row.strength,
        flags=tuple(row.flags),
        reason=row.reason,
        ms_visible=row.ms_visible,
        guideline_version=row.guideline_version,
        revision=row.revision,
        created_at=datetime.fromtimestamp(row.created_at, UTC).isoformat(),
    )


def task_of(row: TaskRow) -> Task:
    """What was added."""
    return Task(
        row.prompt,
        tuple(CompletionShown(**each) for each in row.completions),
        kind=cast(Any, row.kind),
        need=row.need,
        source=row.source,
        p_select=row.p_select,
        priority=row.priority,
        gold_ranks=None if row.gold_ranks is None else tuple(row.gold_ranks),
        reward_model=row.reward_model,
        metadata=row.details,
        task_id=row.id,
    )


def _row(task: Task) -> TaskRow:
    return TaskRow(
        id=task.task_id,
        kind=task.kind,
        prompt_id=prompt_id_of(task.prompt),
        prompt=task.prompt,
        details=dict(task.metadata),
        completions=[asdict(each) for each in task.completions],
        need=task.need,
        free=task.need,
        priority=task.priority,
        source=task.source,
        p_select=task.p_select,
        reward_model=task.reward_model,
        gold_ranks=None if task.gold_ranks is None else list(task.gold_ranks),
        created_at=time.time(),
    )


def _answers(all_revisions: bool, late: bool) -> Select[JudgmentRow, str]:
    query = (
        select(JudgmentRow, Account.pseudonym)
        .join(Account, Account.id == JudgmentRow.account_id)
        .join(Assignment, Assignment.id == JudgmentRow.assignment_id)
        .join(TaskRow, TaskRow.seq == Assignment.task_seq)
        .where(Account.state != WITHDRAWN)
        .order_by(JudgmentRow.id)
    )
    if not late:
        query = query.where(JudgmentRow.late.is_(False))
    return query if all_revisions else query.where(_is_newest())


def _is_newest() -> ColumnElement[bool]:
    newer = aliased(JudgmentRow)
    return ~(
        select(newer.id)
        .where(newer.assignment_id == JudgmentRow.assignment_id, newer.revision > JudgmentRow.revision)
        .exists()
    )


def _counts(session: Session, chosen: ColumnElement[bool]) -> Counts:
    asked = (chosen, TaskRow.source.not_in(OWN_SOURCES))
    tasks, needed = session.execute(
        select(func.count(), func.coalesce(func.sum(TaskRow.need), 0)).where(*asked, TaskRow.closed.is_(False))
    ).one()
    by_state = dict(
        session.execute(
            select(Assignment.state, func.count()).select_from(Assignment).join(TaskRow).where(*asked).group_by("state")
        ).all()
    )
    done = session.scalars(
        select(func.count()).select_from(Assignment).join(TaskRow)
        .where(*asked, TaskRow.closed.is_(False), Assignment.state == DONE, Assignment.slot.is_not(None))
    ).one()  # fmt: skip
    skipped = _count_rows(session, Skip, chosen)
    judgments = _count_rows(session, JudgmentRow, chosen)
    return Counts(tasks, needed, done, by_state.get(HELD, 0), skipped, by_state.get(LATE, 0), judgments)


def _at_work(chosen: ColumnElement[bool]) -> Select[int]:
    """Who has been given one of these, and may be given more."""
    query = select(Assignment.account_id).join(TaskRow).join(Account, Account.id == Assignment.account_id)
    return query.where(chosen, Account.state == ACTIVE).distinct()


def _passed(chosen: ColumnElement[bool], at_work: Collection[int]) -> Select[int]:
    of_task = Assignment.task_seq == TaskRow.seq
    skipped = select(Assignment.id).where(of_task, Assignment.state == SKIPPED).exists()
    is_through = (Assignment.account_id == Account.id, Assignment.state.in_((DONE, LATE, SKIPPED)))
    through = select(Assignment.id).where(of_task, *is_through).correlate(TaskRow, Account).exists()
    left = select(Account.id).where(Account.id.in_(at_work), ~through).correlate(TaskRow).exists()
    query = select(func.coalesce(func.sum(TaskRow.free), 0))
    return query.where(chosen, TaskRow.source.not_in(OWN_SOURCES), TaskRow.closed.is_(False), skipped, ~left)


def _count_rows(session: Session, kind: type[JudgmentRow] | type[Skip], chosen: ColumnElement[bool]) -> int:
    query = select(func.count()).select_from(kind).join(Assignment, Assignment.id == kind.assignment_id).join(TaskRow)
    return session.scalars(query.where(chosen)).one()


def _known(session: Session, ids: Sequence[str]) -> Iterable[str]:
    return session.scalars(select(TaskRow.id).where(TaskRow.id.in_(ids)))


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE))
