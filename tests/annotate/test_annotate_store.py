"""Leases, fences, answers: on SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.annotate.store import Store
from rlhf.annotate.tasks import Task, dense
from rlhf.errors import RequestError, SettingsError, StorageError
from rlhf.feedback.judgments import CompletionShown
from support.annotating import sqlite, task
from support.annotation_semantics import AnnotationSemantics


class TestSqlite(AnnotationSemantics):
    @pytest.fixture
    def database_url(self, tmp_path: Path) -> str:
        return sqlite(tmp_path)


def test_sqlite_is_durable(tmp_path: Path) -> None:
    store = Store(sqlite(tmp_path))
    with store.database.engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
    store.close()
    assert found == {"journal_mode": "wal", "synchronous": 2}


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(RequestError, match="not 10"):
        Task("prompt", tuple(CompletionShown(str(number)) for number in range(10)))
    with pytest.raises(RequestError, match="a pair has two"):
        task(completions=3, kind="pair")
    with pytest.raises(RequestError, match="gold"):
        task(source="gold")


def test_ranks_are_made_dense() -> None:
    assert dense((3, 3, 7)) == (1, 1, 2)


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        Store(f"sqlite:///{tmp_path}/nowhere/annotate.db")
    with pytest.raises(SettingsError, match=r"annotate\.database"):
        Store("nonsense")
