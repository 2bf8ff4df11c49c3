from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from rlhf.errors import Unavailable
from rlhf.queues import registry as registry_module
from rlhf.queues.connection import open_client
from rlhf.queues.keys import RunKeys
from rlhf.queues.registry import Current, Registry, Replica, open_registry
from rlhf.queues.settings import RedisSettings
from rlhf.wire.records import WeightVersion
from support.proxy import Proxy


def version(epoch: int, step: int, run: str = "r") -> WeightVersion:
    return WeightVersion(run, epoch, step, f"{epoch:032x}{step:032x}")


@pytest.fixture
def client(redis_settings: RedisSettings) -> Iterator[redis.Redis]:
    with open_client(redis_settings.url, redis_settings) as client:
        yield client


@pytest.fixture
def registry(client: redis.Redis, run_name: str, redis_settings: RedisSettings) -> Registry:
    return open_registry(client, run_name, redis_settings)


def test_the_pointer_moves_forward_from_where_the_caller_thinks_it_is(registry: Registry) -> None:
    assert registry.current() is None
    assert not registry.advance(version(0, 1), "file:///w/0-1", expected=version(0, 0))
    assert registry.advance(version(0, 1), "file:///w/0-1", expected=None)
    assert registry.current() == Current(version(0, 1), "file:///w/0-1")
    assert not registry.advance(version(0, 2), "file:///w/0-2", expected=None)
    assert registry.advance(version(0, 2), "file:///w/0-2", expected=version(0, 1))
    assert registry.current() == Current(version(0, 2), "file:///w/0-2")


def test_asking_twice_is_yes_twice(registry: Registry) -> None:
    assert registry.advance(version(0, 1), "u", None)
    assert registry.advance(version(0, 1), "u", None)
    assert not registry.advance(version(0, 1), "elsewhere", None)


@pytest.mark.parametrize(
    "candidate", [version(2, 9), version(1, 99), dataclasses.replace(version(2, 10), sha256="ff"), version(9, 9, "s")]
)
def test_the_pointer_never_goes_back(registry: Registry, candidate: WeightVersion) -> None:
    assert registry.advance(version(2, 10), "u", None)
    assert not registry.advance(candidate, "u", expected=version(2, 10))
    assert registry.current() == Current(version(2, 10), "u")


def test_a_later_epoch_counts_as_later_whatever_its_step(registry: Registry) -> None:
    assert registry.advance(version(0, 40), "u", None)
    assert registry.advance(version(1, 30), "v", version(0, 40))


def test_of_many_who_advance_at_once_one_succeeds(registry: Registry) -> None:
    registry.advance(version(0, 0), "u", None)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: registry.advance(version(0, i), "u", version(0, 0)), range(1, 17)))
    assert won.count(True) == 1
    current = registry.current()
    assert current is not None
    assert current.version.step == won.index(True) + 1


def test_a_lost_reply_of_advance_is_still_a_yes(redis_settings: RedisSettings, run_name: str, tmp_path: Path) -> None:
    with Proxy(redis_settings.url, tmp_path) as proxy, open_client(proxy.url, redis_settings) as client:
        registry = open_registry(client, run_name, redis_settings)
        assert registry.advance(version(0, 1), "u", None)
        proxy.lose_reply_of(b"EVALSHA")
        assert registry.advance(version(0, 2), "u", version(0, 1))
        assert proxy.lost == 1


def test_a_change_wakes_who_waits(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.advance(version(0, 1), "u", None)
    seen = registry.current()
    monkeypatch.setattr(registry_module, "MAX_BLOCK_S", 10.0)
    timer = threading.Timer(0.3, lambda: registry.advance(version(0, 2), "u", version(0, 1)))
    timer.start()
    began = time.monotonic()
    assert registry.wait_for_change(20.0, seen) == Current(version(0, 2), "u")
    assert time.monotonic() - began < 5, "woken by the message, not by the next look"
    timer.join()


def test_who_is_told_to_stop_waits_no_longer(registry: Registry) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    began = time.monotonic()
    assert registry.wait_for_change(20.0, None, stop) is None
    assert time.monotonic() - began < 5
    timer.join()


def test_waiting_sees_what_changed_before_and_ends_in_time(registry: Registry) -> None:
    assert registry.wait_for_change(0.2) is None
    registry.advance(version(0, 1), "u", None)
    began = time.monotonic()
    seen = registry.wait_for_change(20.0, None)
    assert seen == Current(version(0, 1), "u")
    assert registry.wait_for_change(0.3, seen) == seen
    assert 0.25 < time.monotonic() - began < 3


def test_a_change_without_its_message_is_seen_all_the_same(
    registry: Registry, client: redis.Redis, run_name: str
) -> None:
    fields = {"run_id": "r", "epoch": 0, "step": 7, "sha256": "ab", "uri": "u"}
    threading.Timer(0.2, lambda: client.hset(RunKeys(run_name).current, mapping=fields)).start()
    found = registry.wait_for_change(10.0, None)
    assert found is not None
    assert found.version.step == 7


def test_replicas_live_as_long_as_their_lease(client: redis.Redis, run_name: str) -> None:
    registry = Registry(client, RunKeys(run_name), lease_s=0.3)
    one = Replica("policy-1", "127.0.0.1:7101", version(0, 1), None, ready=False)
    two = Replica("policy-0", "127.0.0.1:7102", version(0, 1), version(0, 2), ready=True)
    registry.register(one)
    registry.register(two)
    assert registry.replicas() == [two, one]
    registry.register(dataclasses.replace(one, ready=True))
    assert registry.replicas() == [two, dataclasses.replace(one, ready=True)]
    time.sleep(0.2)
    registry.register(two)
    time.sleep(0.2)
    assert registry.replicas() == [two]
    registry.unregister("policy-0")
    assert registry.replicas() == []
    assert client.exists(RunKeys(run_name).replicas) == 0, "names without a value are forgotten"


def test_beats_carry_a_state_and_expire(client: redis.Redis, run_name: str) -> None:
    registry = Registry(client, RunKeys(run_name), lease_s=0.2)
    registry.beat("rollouts", "worker-0", {"in_flight": 3})
    registry.beat("policy", "policy-0", {"version": "r/0-1", "waits_for": None})
    registry.beat("rollouts", "worker-0", {"in_flight": 4})
    beats = registry.beats()
    assert [(b.service, b.name, dict(b.fields)) for b in beats] == [
        ("policy", "policy-0", {"version": "r/0-1", "waits_for": None}),
        ("rollouts", "worker-0", {"in_flight": 4}),
    ]
    assert all(0 <= beat.age_s < 2 for beat in beats)
    time.sleep(0.3)
    assert registry.beats() == []


def test_runs_do_not_meet(client: redis.Redis, run_name: str, redis_settings: RedisSettings) -> None:
    open_registry(client, run_name, redis_settings).advance(version(0, 1), "u", None)
    assert open_registry(client, run_name + "-2", redis_settings).current() is None


def test_a_report_that_redis_took_makes_the_beat_file_new(
    client: redis.Redis, run_name: str, redis_settings: RedisSettings, tmp_path: Path
) -> None:
    file = tmp_path / "beat"
    own = open_registry(client, run_name, redis_settings.model_copy(update={"beat_file": file}))
    own.replicas()
    assert not file.exists(), "looking is no report"
    own.beat("ppo", "trainer-0", {})
    assert file.stat().st_mtime == pytest.approx(time.time(), abs=5)
    away = redis.Redis.from_url("unix:///nowhere/redis.sock")
    file.unlink()
    with pytest.raises(Unavailable):
        Registry(away, RunKeys(run_name), 1.0, timeout_s=0.1, beat_file=file).beat("ppo", "trainer-0", {})
    assert not file.exists()
