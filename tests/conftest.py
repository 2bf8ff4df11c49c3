"""What the whole suite shares: one embedded Redis, and keys of its own for every test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from rlhf.queues.settings import RedisSettings
from rlhf.supervisor.embedded_redis import EmbeddedRedis

# The same examples in every run, and no limit on one example's time: machines are shared.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")
pytest.register_assert_rewrite("support.queue_semantics", "support.annotation_semantics")


@pytest.fixture(scope="session")
def embedded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real server that the whole session shares."""
    server = EmbeddedRedis(Path(tmp_path_factory.mktemp("redis")))
    yield server.start()
    server.stop()


@pytest.fixture
def run_name() -> str:
    """A run, and so keys, of the test's own."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def redis_settings(embedded_redis: str) -> RedisSettings:
    """Settings that reach the shared server and give up soon."""
    return RedisSettings(url=embedded_redis, connect_timeout_s=5.0, reclaim_idle_s=0.3)
