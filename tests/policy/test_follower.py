"""A replica in a run: registered, ready only with the run's current weights, and following them by itself."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.models.weights import WEIGHTS_FILE, write_weights
from rlhf.policy.server import POLICY, SERVICES, advertised, starting
from rlhf.policy.settings import PolicySettings
from rlhf.queues.connection import open_client
from rlhf.queues.keys import RunKeys
from rlhf.queues.registry import Registry
from rlhf.queues.settings import RedisSettings
from rlhf.serving.client import call, connect
from rlhf.serving.server import Server, running
from rlhf.settings.run import Settings
from rlhf.supervisor.embedded_redis import EmbeddedRedis
from rlhf.supervisor.settings import RunSettings
from rlhf.v1 import policy_pb2, policy_pb2_grpc
from rlhf.wire.messages import from_version
from rlhf.wire.records import WeightVersion
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm_folder(tmp_path_factory.mktemp("follower") / "model")


@pytest.fixture
def registry(redis_settings: RedisSettings, run_name: str) -> Iterator[Registry]:
    with open_client(redis_settings.url, redis_settings) as client:
        yield Registry(client, RunKeys(run_name), 10)


class Replica:
    def __init__(self, channel: Any) -> None:
        self._policy = policy_pb2_grpc.PolicyServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]

    async def version(self) -> WeightVersion:
        info = await call(self._policy.Info, policy_pb2.PolicyInfoRequest(), timeout_s=5)
        return from_version(info.current)

    async def ready(self) -> bool:
        answer = await self._health.Check(health_pb2.HealthCheckRequest(service=POLICY), timeout=5)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def replica(folder: Path, run: str, url: str, **settings: Any) -> AsyncIterator[Replica]:
    policy = PolicySettings(
        **{"model": folder, "join_run": True, "weights_poll_s": 0.05, "advertise": "here:1", **settings}
    )
    all_settings = Settings(run=RunSettings(name=run), redis=RedisSettings(url=url, connect_timeout_s=5), policy=policy)
    async with (
        running("policy", policy, SERVICES, starting(all_settings)) as server,
        connect(server.address) as channel,
    ):
        yield Replica(channel)


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 (a client can only ask)
            await asyncio.sleep(0.02)


def publish(place: Path, step: int) -> WeightVersion:
    own = tokenizer_sha256(tiny_tokenizer())
    return write_weights(place, tiny_lm(seed=step), run_id="r", epoch=0, step=step, tokenizer_sha256=own)


def spoil(file: Path) -> bytes:
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return whole


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a coroutine, in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))  # type: ignore[arg-type]

    return run


@in_loop
async def test_a_replica_registers_follows_and_leaves(
    folder: Path, tmp_path: Path, registry: Registry, run_name: str, redis_settings: RedisSettings
) -> None:
    async with replica(folder, run_name, redis_settings.url) as it:
        await until(it.ready)
        assert (await it.version()).run_id == "", "nothing is published: the start model will do"
        first = publish(tmp_path / "0-1", 1)
        assert registry.advance(first, (tmp_path / "0-1").as_uri(), None)
        await until(lambda: _holds(it, first))

        async def registered() -> bool:
            return [(r.name, r.address, r.version, r.ready) for r in registry.replicas()] == [
                ("policy-0", "here:1", first, True)
            ]

        await until(registered)

        async def reported() -> bool:
            return [beat.fields["version"] for beat in registry.beats()] == [str(first)]

        await until(reported)
    assert registry.replicas() == []


async def _holds(it: Replica, version: WeightVersion) -> bool:
    return await it.version() == version


@in_loop
async def test_a_replica_is_woken_by_the_change_and_leaves_without_waiting(
    folder: Path, tmp_path: Path, registry: Registry, run_name: str, redis_settings: RedisSettings
) -> None:
    first = publish(tmp_path / "0-1", 1)
    async with replica(folder, run_name, redis_settings.url, weights_poll_s=60) as it:
        await until(it.ready)
        registry.advance(first, str(tmp_path / "0-1"), None)
        await until(lambda: _holds(it, first))
        leaves = time.monotonic()
    assert time.monotonic() - leaves < 10


@in_loop
async def test_a_new_replica_is_not_ready_until_it_holds_what_is_current(
    folder: Path, tmp_path: Path, registry: Registry, run_name: str, redis_settings: RedisSettings
) -> None:
    current = publish(tmp_path / "0-1", 1)
    whole = spoil(tmp_path / "0-1" / WEIGHTS_FILE)
    registry.advance(current, str(tmp_path / "0-1"), None)
    async with replica(folder, run_name, redis_settings.url) as it:
        await asyncio.sleep(0.3)
        assert not await it.ready()
        assert [r.ready for r in registry.replicas()] == [False]
        (tmp_path / "0-1" / WEIGHTS_FILE).write_bytes(whole)
        await until(it.ready)
        assert await it.version() == current


@in_loop
async def test_a_replica_that_lags_beyond_the_grace_is_not_ready(
    folder: Path, tmp_path: Path, registry: Registry, run_name: str, redis_settings: RedisSettings
) -> None:
    async with replica(folder, run_name, redis_settings.url, weights_grace_s=0.5) as it:
        await until(it.ready)
        missed = publish(tmp_path / "0-1", 1)
        whole = spoil(tmp_path / "0-1" / WEIGHTS_FILE)
        registry.advance(missed, str(tmp_path / "0-1"), None)
        began = time.monotonic()

        async def not_ready() -> bool:
            return not await it.ready()

        await until(not_ready)
        assert time.monotonic() - began >= 0.4
        (tmp_path / "0-1" / WEIGHTS_FILE).write_bytes(whole)
        await until(it.ready)
        assert await it.version() == missed


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "redis")
    yield server
    server.stop()


@in_loop
async def test_a_replica_outlives_redis(folder: Path, tmp_path: Path, run_name: str, own_redis: EmbeddedRedis) -> None:
    url = await asyncio.to_thread(own_redis.start)
    async with replica(folder, run_name, url) as it:
        await until(it.ready)
        assert own_redis.pid is not None
        os.kill(own_redis.pid, signal.SIGKILL)
        await asyncio.sleep(0.3)
        assert await it.ready()
        await it.version()
        assert await asyncio.to_thread(own_redis.start) == url
        with redis.Redis.from_url(url) as client:
            missed = publish(tmp_path / "0-1", 1)
            Registry(client, RunKeys(run_name), 10).advance(missed, str(tmp_path / "0-1"), None)
            await until(lambda: _holds(it, missed))


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ({"host": "127.0.0.1"}, "127.0.0.1:7101"),
        ({"host": "0.0.0.0"}, f"{socket.gethostname()}:7101"),
        ({"host": "0.0.0.0", "advertise": "policy-0.example:80"}, "policy-0.example:80"),
    ],
)
def test_where_the_trainer_reaches_a_replica(listen: dict[str, str], address: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")

    async def scenario() -> str:
        settings = PolicySettings(**listen, token_file=tmp_path / "token")  # type: ignore[arg-type]
        server = Server("policy", settings, SERVICES)
        server.port = 7101
        return advertised(server, settings)

    assert asyncio.run(scenario()) == address
