"""Leases, fences and answers on a real PostgreSQL server."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rlhf.annotate.store import Store
from support.annotating import task
from support.annotation_semantics import AnnotationSemantics
from support.postgres import Postgres

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    server.start()
    yield server
    server.stop()


class TestPostgres(AnnotationSemantics):
    @pytest.fixture
    def database_url(self, postgres: Postgres) -> str:
        return postgres.new_database()


def test_replicas_that_start_together_migrate_once(postgres: Postgres) -> None:
    url, problems = postgres.new_database(), []

    def start() -> None:
        try:
            store = Store(url)
            store.add_tasks([task(0)])
            store.close()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    store = Store(url)
    assert store.counts().tasks == 1
    store.close()
