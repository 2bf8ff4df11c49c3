"""The connection: SQLite that loses nothing it has acknowledged, or PostgreSQL; transactions; migrations.

On SQLite every writing transaction takes the write lock at its start (BEGIN IMMEDIATE), so what it reads cannot change
before it writes; on PostgreSQL rows are locked as they are read (`locked`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, Select, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from rlhf.errors import SettingsError, StorageError, Unavailable, first_line

Row = TypeVar("Row")
BUSY_TIMEOUT_MS = 15_000
"""How long a writer waits for another before it gives up."""
_MIGRATION_LOCK = 7_104_000
"""PostgreSQL's advisory lock, so that replicas that start together migrate one after the other."""


class Database:
    """One database, brought to the newest schema."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: as SQLAlchemy takes it, `sqlite:///FILE` or `postgresql+psycopg://…`.

        Raises:
            SettingsError: no such kind of database.
            Unavailable: it does not answer.
            StorageError: the file cannot be opened.
        """
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._readers = self.engine.execution_options(reads_only=True)
        try:
            self._migrate()
        except DBAPIError as error:
            kind = StorageError if self.is_sqlite else Unavailable
            shown = make_url(url).render_as_string()
            raise kind(f"{shown}: the database cannot be used: {first_line(error.orig or error)}") from error

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent view; waits for no writer."""
        with Session(self._readers, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """One transaction, durable when the block has ended; undone if it raises."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def locked(self, query: Select[Row], *, skip: bool = False) -> Select[Row]:
        """The query with its rows locked; `skip` leaves out those that another has. SQLite's transactions need none."""
        first = query.column_descriptions[0]["entity"]
        # Not against inserts of rows that refer to these.
        return query if self.is_sqlite else query.with_for_update(skip_locked=skip, key_share=True, of=first)

    def close(self) -> None:
        self.engine.dispose()

    def _migrate(self) -> None:
        with self.engine.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            command.upgrade(migrations(connection), "head")


def migrations(connection: Connection) -> Config:
    """Alembic's configuration; a file of it would have to be found by people who installed a wheel."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def _engine(url: str) -> Engine:
    try:
        target = make_url(url)
        if target.get_backend_name() == "sqlite":
            return _sqlite(url)
        return create_engine(url, pool_size=20, max_overflow=20, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise SettingsError(f"annotate.database: {first_line(error)}") from error
    except ModuleNotFoundError as error:
        raise SettingsError(f"annotate.database: {error}; pip install 'rlhf-services[postgres]'") from error


def _sqlite(url: str) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, pool_size=20, max_overflow=20)

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: object) -> None:
        # Python's sqlite3 would begin transactions by itself, and never IMMEDIATE ones.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads_only = connection.get_execution_options().get("reads_only", False)
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")

    return engine
