"""The page's tables. Nothing a person answered is ever changed or removed: judgments and skips are append-only.

    account ──< assignment >── task            one row per person and task; a slot of the task while it is held or done
                    │
                    ├──< judgment              one row per revision, in the order shown
                    └──< skip

Times are seconds since 1970. Structured values are JSON texts of what `rlhf.feedback.judgments` defines.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, MetaData, UniqueConstraint, and_, literal_column
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

HELD, DONE, SKIPPED, LOST, LATE = "held", "done", "skipped", "lost", "late"
"""States of an assignment. Lost: the lease ran out and somebody else took the task. Late: answered after that."""
ACTIVE, PAUSED, WITHDRAWN = "active", "paused", "withdrawn"
"""States of an account."""


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {list[Any]: JSON, dict[str, Any]: JSON}  # noqa: RUF012  (SQLAlchemy reads it so)


class Account(Base):
    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    pseudonym: Mapped[str] = mapped_column(unique=True)
    """What judgments are signed with; says nothing about the person."""
    role: Mapped[str]
    state: Mapped[str] = mapped_column(default=ACTIVE)
    password_hash: Mapped[str]
    guideline_version: Mapped[str] = mapped_column(default="")
    """The newest that this person has said to have read."""
    created_at: Mapped[float]


class Invite(Base):
    """A link that works once: for a new account, or for a new password of an account there is."""

    __tablename__ = "invite"
    token_hash: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    account_id: Mapped[int | None] = mapped_column(ForeignKey("account.id"))
    expires_at: Mapped[float]
    used_at: Mapped[float | None]


class Login(Base):
    """A session: what its cookie means is known only here."""

    __tablename__ = "login"
    token_hash: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"), index=True)
    csrf: Mapped[str]
    expires_at: Mapped[float]
    account: Mapped[Account] = relationship(lazy="joined", innerjoin=True)


class LoginFailure(Base):
    __tablename__ = "login_failure"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    host: Mapped[str]
    at: Mapped[float] = mapped_column(index=True)


class Guideline(Base):
    __tablename__ = "guideline"
    version: Mapped[str] = mapped_column(primary_key=True)
    """Beginning of the text's sha256."""
    text: Mapped[str]
    created_at: Mapped[float]


class TaskRow(Base):
    __tablename__ = "task"
    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    prompt_id: Mapped[str]
    prompt: Mapped[str]
    details: Mapped[dict[str, Any]]
    """The prompt's metadata."""
    completions: Mapped[list[Any]]
    """[K] objects of text, id, policy_version and sampling."""
    need: Mapped[int]
    free: Mapped[int]
    """Slots that nobody holds or has answered."""
    fence: Mapped[int] = mapped_column(default=0)
    """Grows whenever somebody gets the task."""
    priority: Mapped[float]
    source: Mapped[str]
    p_select: Mapped[float | None]
    reward_model: Mapped[str]
    """By which the task was selected."""
    gold_ranks: Mapped[list[Any] | None]
    repeats: Mapped[str | None]
    """The task that this one repeats."""
    only_for: Mapped[int | None] = mapped_column(ForeignKey("account.id"))
    closed: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float]


# With a literal zero: SQLite uses a partial index only for a query that states its condition in the same words.
OPEN = and_(TaskRow.free > literal_column("0"), TaskRow.closed.is_(False))
"""Somebody can be given the task."""
Index("ix_task_next", TaskRow.priority.desc(), TaskRow.seq, sqlite_where=OPEN, postgresql_where=OPEN)


class Assignment(Base):
    __tablename__ = "assignment"
    id: Mapped[int] = mapped_column(primary_key=True)
    task_seq: Mapped[int] = mapped_column(ForeignKey("task.seq"))
    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"))
    slot: Mapped[int | None]
    """Which of the task's `need` answers this is; None once it is skipped, lost or withdrawn."""
    order_shown: Mapped[list[Any]]
    """[K]"""
    state: Mapped[str]
    fence: Mapped[int]
    """The task's when this person got it: an answer with another one comes from a lease that was lost."""
    lease_until: Mapped[float]
    created_at: Mapped[float]
    task: Mapped[TaskRow] = relationship(lazy="joined", innerjoin=True)
    __table_args__ = (
        UniqueConstraint("task_seq", "slot"),
        UniqueConstraint("task_seq", "account_id"),
        Index("ix_assignment_mine", "account_id", "state"),
        Index("ix_assignment_expired", "state", "lease_until"),
    )


class JudgmentRow(Base):
    __tablename__ = "judgment"
    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignment.id"))
    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"))
    revision: Mapped[int]
    key: Mapped[str] = mapped_column(unique=True)
    """Of the form that was submitted: submitting it again changes nothing."""
    fence: Mapped[int]
    late: Mapped[bool]
    """Somebody else had the task by then."""
    ranks: Mapped[list[Any]]
    strength: Mapped[int | None]
    flags: Mapped[list[Any]]
    reason: Mapped[str]
    ms_visible: Mapped[int | None]
    guideline_version: Mapped[str]
    created_at: Mapped[float]
    assignment: Mapped[Assignment] = relationship(lazy="joined", innerjoin=True)
    __table_args__ = (
        UniqueConstraint("assignment_id", "revision"),
        Index("ix_judgment_recent", "account_id", "created_at"),
    )


class Skip(Base):
    __tablename__ = "skip"
    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignment.id"))
    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"), index=True)
    key: Mapped[str] = mapped_column(unique=True)
    flags: Mapped[list[Any]]
    reason: Mapped[str]
    created_at: Mapped[float]
