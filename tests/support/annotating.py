"""People and tasks for tests of the annotation page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from argon2 import PasswordHasher

from rlhf.annotate.accounts import log_in
from rlhf.annotate.store import Store
from rlhf.annotate.tables import Account
from rlhf.annotate.tasks import Task
from rlhf.feedback.judgments import CompletionShown

PASSWORD = "correct horse battery"
NOW = 1_700_000_000.0


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'annotate.db'}"


def task(number: int = 0, completions: int = 3, **fields: object) -> Task:
    shown = tuple(
        CompletionShown(f"reply {letter} to {number}", policy_version="run/1/0", sampling={"temperature": 0.7})
        for letter in "abcdefghi"[:completions]
    )
    return Task(f"prompt {number}", shown, **fields)  # type: ignore[arg-type]


def add_person(store: Store, name: str, role: str = "annotator", now: float = NOW, pseudonym: str = "") -> int:
    """The account's id."""
    signs = pseudonym or f"a-{name}!"
    account = Account(name=name, pseudonym=signs, role=role, password_hash=_hashed(), created_at=now)
    with store.database.writing() as session:
        session.add(account)
    return account.id


@cache
def _hashed() -> str:
    """Once: it is slow on purpose."""
    return PasswordHasher().hash(PASSWORD)


def session_of(store: Store, name: str, now: float = NOW) -> str:
    """The cookie of a new session."""
    return log_in(store.database, name, PASSWORD, "127.0.0.1", now, session_s=3600, failures=8)
