"""The queue on Debian's redis-server, which may be another version than the one the rest of the suite uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.supervisor.embedded_redis import EmbeddedRedis
from support.queue_semantics import QueueSemantics

pytestmark = pytest.mark.system

DEBIAN_SERVER = Path("/usr/bin/redis-server")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    if not DEBIAN_SERVER.exists():
        pytest.fail(f"{DEBIAN_SERVER} is missing: apt-get install redis-server")
    server = EmbeddedRedis(
        tmp_path_factory.mktemp("redis"),
        search_path=str(DEBIAN_SERVER.parent),
        bundled=Path("/nonexistent"),
        appendfsync="no",
    )
    server.start()
    yield server
    server.stop()


class TestDebianRedis(QueueSemantics):
    torture_kills = 20
