from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from rlhf.errors import NotAuthorized, RedisUnsuitable, SettingsError, Unavailable
from rlhf.queues.connection import check_suitable, connect, open_client, patiently, without_password
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Enqueued, rollouts_queue
from rlhf.settings.run import Settings
from rlhf.supervisor.embedded_redis import EmbeddedRedis
from support.proxy import Proxy

SUITABLE = {"redis_version": "6.2.14", "maxmemory_policy": "noeviction", "aof_enabled": 1}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server whose configuration the test may change."""
    server = EmbeddedRedis(tmp_path / "runs" / "r" / "redis")
    server.start()
    yield server
    server.stop()


def settings_for(url: str, folder: Path, **changes: object) -> Settings:
    return Settings.model_validate(
        {"run": {"name": "r", "folder": folder}, "redis": {"url": url, "connect_timeout_s": 15.0, **changes}}
    )


def configure(url: str, **options: str) -> None:
    with redis.Redis.from_url(url) as client:
        for name, value in options.items():
            client.config_set(name.replace("_", "-"), value)


def test_connects_to_the_embedded_server_of_the_run(server: EmbeddedRedis, tmp_path: Path) -> None:
    with connect(settings_for("embedded://", tmp_path / "runs")) as client:
        assert client.ping() is True
        assert client.get_connection_kwargs()["decode_responses"] is False
        assert client.get_connection_kwargs()["retry"].get_retries() == 0, "redis-py would send XADD twice"


def test_waits_for_the_embedded_server_to_come_up(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "runs" / "r" / "redis")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect, settings_for("embedded://", tmp_path / "runs"))
        time.sleep(0.3)
        assert not waiting.done()
        server.start()
        with waiting.result(20) as client:
            assert client.ping() is True
    server.stop()


def test_no_embedded_server_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"address\.json did not appear within 0 s; start `rlhf run`, or set redis.url"
    ):
        connect(settings_for("embedded://", tmp_path, connect_timeout_s=0.3))


def test_refuses_a_server_that_evicts(server: EmbeddedRedis, tmp_path: Path) -> None:
    configure(server.url, maxmemory_policy="allkeys-lru")
    with pytest.raises(RedisUnsuitable, match=r"allkeys-lru.*set `maxmemory-policy noeviction`"):
        connect(settings_for(server.url, tmp_path))


def test_refuses_a_server_without_append_only_file(server: EmbeddedRedis, tmp_path: Path) -> None:
    configure(server.url, appendonly="no")
    with pytest.raises(RedisUnsuitable, match=r"no append-only file.*set `appendonly yes`"):
        connect(settings_for(server.url, tmp_path))


def test_a_person_may_accept_the_loss(server: EmbeddedRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    configure(server.url, appendonly="no", maxmemory_policy="volatile-lru")
    with caplog.at_level(logging.WARNING), connect(settings_for(server.url, tmp_path, require_durable=False)) as client:
        assert client.ping() is True
    assert "volatile-lru" in caplog.text
    assert "append-only" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16; 6.2 or newer is needed"),
        ({"redis_version": "5.0.3"}, "upgrade the server"),
        ({"maxmemory_policy": "unknown"}, "require_durable = false"),
        ({"aof_enabled": 0}, "append-only"),
    ],
)
def test_an_unsuitable_server(change: dict[str, object], sentence: str) -> None:
    check_suitable(dict(SUITABLE), RedisSettings(), "r")
    check_suitable({**SUITABLE, "redis_version": "10.0.1"}, RedisSettings(), "r")
    with pytest.raises(RedisUnsuitable, match=sentence):
        check_suitable({**SUITABLE, **change}, RedisSettings(), "r")


def test_passwords(server: EmbeddedRedis, tmp_path: Path) -> None:
    configure(server.url, requirepass="hush")
    with pytest.raises(NotAuthorized, match="refuses the password"):
        connect(settings_for(server.url, tmp_path))
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    with pytest.raises(NotAuthorized, match=r"refuses the password.*redis.password_file"):
        connect(settings_for(server.url, tmp_path, password_file=str(secret)))
    secret.write_text("hush\n")
    with connect(settings_for(server.url, tmp_path, password_file=str(secret))) as client:
        assert client.ping() is True
        client.config_set("requirepass", "")
    with pytest.raises(SettingsError, match=r"redis.password_file: .*nowhere"):
        connect(settings_for(server.url, tmp_path, password_file="nowhere"))


def test_a_url_that_is_none_is_refused_and_no_password_is_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^redis.url: .*received 'http://host/'$"):
        connect(settings_for("http://user:hush@host/", tmp_path))
    assert without_password("redis://u:hush@host:1/0") == "redis://host:1/0"


def test_nobody_there_is_unavailable_after_the_time_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(Unavailable, match=r"redis.sock has not answered for 0\.\d s"):
        connect(settings_for(f"unix://{tmp_path}/redis.sock", tmp_path, connect_timeout_s=0.5))
    assert 0.4 < time.monotonic() - began < 3
    assert "trying again for up to" in caplog.text


def test_a_server_that_still_loads_counts_as_away(embedded_redis: str, tmp_path: Path) -> None:
    with Proxy(embedded_redis, tmp_path) as proxy:
        proxy.loading = True
        with pytest.raises(Unavailable, match="loading the dataset"):
            connect(settings_for(proxy.url, tmp_path, connect_timeout_s=0.3))
        timer = threading.Timer(0.3, lambda: setattr(proxy, "loading", False))
        timer.start()
        connect(settings_for(proxy.url, tmp_path)).close()
        timer.join()


def test_a_queue_waits_for_its_server_and_then_gives_up(embedded_redis: str, run_name: str, tmp_path: Path) -> None:
    given = RedisSettings(url=embedded_redis, connect_timeout_s=0.6)
    with Proxy(embedded_redis, tmp_path) as proxy, open_client(proxy.url, given) as client:
        queue = rollouts_queue(client, run_name, given)
        proxy.loading = True
        with pytest.raises(Unavailable, match="Redis has not answered"):
            queue.enqueue("a", b"x")
        with pytest.raises(Unavailable, match="Redis has not answered"):
            queue.consume("t", 1, 0.1)
        timer = threading.Timer(0.2, lambda: setattr(proxy, "loading", False))
        timer.start()
        assert queue.enqueue("a", b"x") is Enqueued.ADDED
        timer.join()
        proxy.cut()
        assert [d.item_id for d in queue.consume("t", 1, 1.0)] == ["a"]


def test_a_stopped_consumer_does_not_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    given = RedisSettings(url=f"unix://{tmp_path}/none.sock", connect_timeout_s=30.0)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with open_client(given.url, given) as client:
        assert rollouts_queue(client, "r", given).consume("t", 1, 60.0, stop) == []
    assert time.monotonic() - began < 3


def test_a_fault_of_ours_is_not_tried_again() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")

    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        patiently(call, timeout_s=5, what="Redis")
    assert len(calls) == 1


def test_a_full_disk_is_waited_out() -> None:
    replies: Iterator[Exception | None] = iter(
        [redis.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), None]
    )

    def call() -> str:
        error = next(replies)
        if error is not None:
            raise error
        return "done"

    assert patiently(call, timeout_s=5, what="Redis") == "done"


def test_the_address_file_names_the_server(server: EmbeddedRedis) -> None:
    left = json.loads((server.folder / "address.json").read_text())
    assert left["url"] == server.url
    assert left["pid"] == server.pid
