from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from rlhf.queues.connection import open_client
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Delivery, Enqueued, Failed, Queue, prompts_queue, rollouts_queue
from rlhf.supervisor.embedded_redis import EmbeddedRedis, bundled_server
from support.queue_semantics import QueueSemantics, assert_conserved


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """The one in the wheel where there is one: the oldest version that is supported."""
    bundled = bundled_server()
    path = str(bundled.parent) if bundled else None
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"), search_path=path, appendfsync="no")
    server.start()
    yield server
    server.stop()


class TestStreams(QueueSemantics):
    pass


def test_the_queues_of_a_run_do_not_meet(redis_settings: RedisSettings, run_name: str) -> None:
    with open_client(redis_settings.url, redis_settings) as client:
        prompts = prompts_queue(client, run_name, redis_settings)
        rollouts = rollouts_queue(client, run_name, redis_settings)
        other = prompts_queue(client, run_name + "-2", redis_settings)
        assert prompts.enqueue("a", b"p") is Enqueued.ADDED
        assert rollouts.enqueue("a", b"r") is Enqueued.ADDED
        assert other.consume("w", 8, 0) == []
        assert [d.payload for d in prompts.consume("w", 8, 0)] == [b"p"]
        assert [d.payload for d in rollouts.consume("w", 8, 0)] == [b"r"]


def test_a_full_memory_pushes_back_and_can_be_emptied(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    given = RedisSettings(url=server.start(), connect_timeout_s=5.0)
    try:
        with open_client(server.url, given) as client:
            queue = rollouts_queue(client, "r", given)
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", used + 4 * 2**20)
            added = 0
            while queue.enqueue(str(added), b"x" * 2**18) is Enqueued.ADDED:
                added += 1
                assert added < 100
            client.config_set("maxmemory", used)  # even less than is used now
            held = queue.consume("t", 100, 1.0)
            assert len(held) == added
            assert queue.dead_letter(held[0], "no") is Failed.DEAD
            assert queue.acknowledge(held[1:]) == added - 1
            assert_conserved(queue)
            client.config_set("maxmemory", used + 4 * 2**20)
            assert queue.enqueue("again", b"x") is Enqueued.ADDED
    finally:
        server.stop()


class QueueMachine(RuleBasedStateMachine):
    """Two consumers do anything in any order; a set of ids in Python is what the queue must agree with."""

    queue: Queue
    names = st.sampled_from(["one", "two"])

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.held: dict[str, list[Delivery]] = {"one": [], "two": []}
        self.failures: dict[str, int] = {}
        self.known: set[str] = set()
        self.acknowledged: set[str] = set()
        self.dead: list[str] = []
        self.queue = QueueMachine.fresh()

    @staticmethod
    def fresh() -> Queue:
        raise NotImplementedError

    @rule(item=st.integers(0, 30), size=st.integers(0, 2**18))
    def enqueue(self, item: int, size: int) -> None:
        item_id, depth = str(item), self.queue.depth()
        answer = self.queue.enqueue(item_id, b"x" * size)
        if item_id in self.known:
            assert answer is Enqueued.DUPLICATE
        elif depth.entries >= 6 or depth.bytes + size > 2**20:
            assert answer is Enqueued.FULL
        else:
            assert answer is Enqueued.ADDED
            self.known.add(item_id)
            self.waiting.append(item_id)

    @rule(name=names, count=st.integers(1, 4))
    def consume(self, name: str, count: int) -> None:
        found = self.queue.consume(name, count, 0)
        for delivery in found:
            assert delivery.item_id in self.waiting
            self.waiting.remove(delivery.item_id)
        self.held[name] += found

    @rule(name=names, which=st.integers(0, 5), twice=st.booleans())
    def acknowledge(self, name: str, which: int, twice: bool) -> None:
        chosen = self.held[name][which : which + 2]
        assert self.queue.acknowledge(chosen) == len(chosen)
        assert not twice or self.queue.acknowledge(chosen) == 0
        del self.held[name][which : which + 2]
        self.acknowledged.update(delivery.item_id for delivery in chosen)

    @rule(name=names)
    def fail(self, name: str) -> None:
        if not self.held[name]:
            return
        delivery = self.held[name].pop()
        item_id = delivery.item_id
        self.failures[item_id] = self.failures.get(item_id, 0) + 1
        if self.failures[item_id] < 3:
            assert self.queue.fail(delivery, "x") is Failed.RETRY
            again = [d for d in self.queue.consume(name, 100, 0) if d.item_id == item_id]
            assert len(again) == 1
            self.held[name] += again
        else:
            assert self.queue.fail(delivery, "x") is Failed.DEAD
            self.dead.append(item_id)

    @invariant()
    def the_books_agree(self) -> None:
        depth = self.queue.depth()
        held = sum(len(deliveries) for deliveries in self.held.values())
        assert depth.entries == len(self.waiting) + held
        assert depth.pending == held
        assert depth.counts.acknowledged == len(self.acknowledged)
        assert depth.counts.dead == len(self.dead)
        assert [letter.item_id for letter in self.queue.dead_letters()] == self.dead[-2:]
        assert_conserved(self.queue)


def test_any_order_of_calls_keeps_the_books(redis_settings: RedisSettings, run_name: str) -> None:
    limits = redis_settings.model_copy(
        update={"max_entries": 6, "max_mib": 1, "max_dead_letters": 2, "reclaim_idle_s": 600.0}
    )
    runs = iter(range(10**6))
    with open_client(limits.url, limits) as client:
        QueueMachine.fresh = staticmethod(lambda: rollouts_queue(client, f"{run_name}-{next(runs)}", limits))
        run_state_machine_as_test(
            QueueMachine,
            settings=settings(
                max_examples=40,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
