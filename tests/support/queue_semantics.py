"""What a queue must do, whichever server is behind it. A test module derives a class and says which server."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from rlhf.errors import RequestError, StageFailed
from rlhf.queues.connection import open_client
from rlhf.queues.keys import RunKeys
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Enqueued, Failed, Queue, rollouts_queue
from rlhf.supervisor.embedded_redis import EmbeddedRedis
from support.proxy import Proxy
from support.queue_torture import torture

MakeQueue = Callable[..., Queue]


def assert_conserved(queue: Queue) -> None:
    """Every entry ever added is where the counters say."""
    depth = queue.depth()
    counts = depth.counts
    assert counts.added == counts.acknowledged + counts.dead + counts.lost + depth.entries


class QueueSemantics:
    """Needs a fixture `server`: an EmbeddedRedis that runs, with appendfsync "no" so that a kill loses nothing."""

    torture_kills = 6

    @pytest.fixture
    def settings(self, server: EmbeddedRedis) -> RedisSettings:
        return RedisSettings(url=server.url, connect_timeout_s=10.0, reclaim_idle_s=0.3, max_mib=1, max_entries=8)

    @pytest.fixture
    def run(self) -> str:
        return f"test-{uuid.uuid4().hex[:12]}"

    @pytest.fixture
    def make(self, settings: RedisSettings, run: str) -> Iterator[MakeQueue]:
        """Queues of the test's run, each as from a process of its own."""
        clients: list[redis.Redis] = []

        def make(url: str = "", **changes: object) -> Queue:
            changed = settings.model_copy(update=changes)
            clients.append(open_client(url or settings.url, changed))
            return rollouts_queue(clients[-1], run, changed)

        yield make
        for client in clients:
            client.close()

    def test_an_entry_goes_round(self, make: MakeQueue) -> None:
        queue = make()
        assert queue.enqueue("a/0", b"\x00\xffpayload", {"v": "0:3"}) is Enqueued.ADDED
        depth = queue.depth()
        assert (depth.entries, depth.bytes, depth.pending) == (1, 9, 0)
        (delivery,) = queue.consume("t", 8, 0)
        assert (delivery.item_id, delivery.payload, delivery.redelivered) == ("a/0", b"\x00\xffpayload", False)
        assert delivery.fields == {"v": "0:3"}
        assert queue.depth().pending == 1
        assert queue.acknowledge([delivery]) == 1
        depth = queue.depth()
        assert (depth.entries, depth.bytes, depth.pending, depth.oldest_age_s) == (0, 0, 0, 0.0)
        assert (depth.counts.added, depth.counts.acknowledged, depth.counts.dead, depth.counts.lost) == (1, 1, 0, 0)

    def test_an_empty_payload_goes_round(self, make: MakeQueue) -> None:
        queue = make()
        for name in "ab":
            queue.enqueue(name, b"")
        first, second = queue.consume("t", 8, 0)
        assert queue.acknowledge([first]) == 1
        assert queue.dead_letter(second, "no") is Failed.DEAD
        assert queue.depth().bytes == 0

    def test_entries_added_before_the_first_consumer_are_read(self, make: MakeQueue) -> None:
        for i in range(3):
            make().enqueue(str(i), b"x")
        assert [d.item_id for d in make().consume("t", 8, 0)] == ["0", "1", "2"]

    def test_an_id_is_added_once_even_after_it_was_acknowledged(self, make: MakeQueue) -> None:
        queue = make()
        assert queue.enqueue("a", b"1") is Enqueued.ADDED
        assert queue.enqueue("a", b"2") is Enqueued.DUPLICATE
        assert make().enqueue("a", b"3") is Enqueued.DUPLICATE
        queue.acknowledge(queue.consume("t", 8, 0))
        assert queue.enqueue("a", b"4") is Enqueued.DUPLICATE
        assert queue.counts().added == 1

    def test_an_id_is_forgotten_after_dedupe_s(self, make: MakeQueue) -> None:
        queue = make(dedupe_s=0.05)
        assert queue.enqueue("a", b"1") is Enqueued.ADDED
        time.sleep(0.1)
        assert queue.enqueue("a", b"1") is Enqueued.ADDED

    def test_full_at_the_limit_of_entries_until_one_is_acknowledged(self, make: MakeQueue) -> None:
        queue = make()
        assert [queue.enqueue(str(i), b"x") for i in range(9)] == [Enqueued.ADDED] * 8 + [Enqueued.FULL]
        (first,) = queue.consume("t", 1, 0)
        assert queue.enqueue("8", b"x") is Enqueued.FULL, "in hand still takes its place"
        queue.acknowledge([first])
        assert queue.enqueue("8", b"x") is Enqueued.ADDED
        assert_conserved(queue)

    def test_full_at_the_limit_of_bytes(self, make: MakeQueue) -> None:
        queue = make()
        half = b"x" * 2**19
        assert [queue.enqueue(str(i), half) for i in range(3)] == [Enqueued.ADDED] * 2 + [Enqueued.FULL]
        assert queue.enqueue("empty", b"") is Enqueued.ADDED
        queue.acknowledge(queue.consume("t", 1, 0))
        assert queue.enqueue("2", half) is Enqueued.ADDED

    def test_a_payload_over_the_whole_budget_is_an_error(self, make: MakeQueue) -> None:
        queue = make()
        assert queue.enqueue("fits", b"x" * 2**20) is Enqueued.ADDED
        with pytest.raises(
            RequestError, match=r"1048577 bytes and could never be queued, the limit is 1048576.*max_mib"
        ):
            queue.enqueue("a", b"x" * (2**20 + 1))
        with pytest.raises(RequestError, match="fields may not be named"):
            queue.enqueue("a", b"", {"reason": "no"})

    def test_two_consumers_share_without_overlap(self, make: MakeQueue) -> None:
        queue = make()
        for i in range(8):
            queue.enqueue(str(i), b"x")
        one, two = make().consume("one", 3, 0), make().consume("two", 8, 0)
        assert [d.item_id for d in one] == ["0", "1", "2"]
        assert [d.item_id for d in two] == ["3", "4", "5", "6", "7"]

    def test_a_restarted_consumer_gets_what_it_had_before_what_is_new(self, make: MakeQueue) -> None:
        queue = make()
        for i in range(5):
            queue.enqueue(str(i), b"x")
        assert len(queue.consume("t", 3, 0)) == 3
        again = make()
        assert [(d.item_id, d.redelivered) for d in again.consume("t", 2, 0)] == [("0", True), ("1", True)]
        assert [(d.item_id, d.redelivered) for d in again.consume("t", 2, 0)] == [("2", True)]
        assert [(d.item_id, d.redelivered) for d in again.consume("t", 9, 0)] == [("3", False), ("4", False)]

    def test_what_is_in_hand_is_not_delivered_again(self, make: MakeQueue) -> None:
        queue = make(reclaim_idle_s=0.1)
        queue.enqueue("a", b"x")
        assert len(queue.consume("t", 8, 0)) == 1
        assert queue.consume("t", 8, 0.4) == [], "not as its own idle entry either"

    def test_reclaims_from_a_dead_consumer_when_its_time_is_up(self, make: MakeQueue) -> None:
        queue = make()
        queue.enqueue("a", b"x")
        assert len(make().consume("dead", 8, 0)) == 1
        assert queue.consume("alive", 8, 0) == []
        (taken,) = queue.consume("alive", 8, 3.0)
        assert (taken.item_id, taken.redelivered, taken.consumer) == ("a", True, "alive")
        assert queue.acknowledge([taken]) == 1

    def test_renewing_keeps_an_entry_and_says_when_it_is_gone(self, make: MakeQueue) -> None:
        slow, other = make(reclaim_idle_s=0.6), make(reclaim_idle_s=0.6)
        slow.enqueue("a", b"x")
        held = slow.consume("slow", 8, 0)
        for _ in range(6):
            time.sleep(0.2)
            assert slow.renew(held) == held
            assert other.consume("other", 8, 0) == []
        assert len(other.consume("other", 8, 3.0)) == 1
        assert slow.renew(held) == []
        assert other.depth().pending == 1

    def test_acknowledging_counts_only_what_was_pending(self, make: MakeQueue) -> None:
        one, two = make(reclaim_idle_s=0.05), make(reclaim_idle_s=0.05)
        one.enqueue("a", b"xyz")
        held = one.consume("one", 8, 0)
        time.sleep(0.1)
        stolen = two.consume("two", 8, 0)
        assert one.acknowledge(held) == 1, "its work is done, whoever holds the entry"
        assert (two.acknowledge(stolen), one.acknowledge(held), one.acknowledge([])) == (0, 0, 0)
        assert one.counts().acknowledged == 1
        assert one.depth().bytes == 0

    def test_three_failures_are_a_dead_letter(self, make: MakeQueue) -> None:
        queue = make()
        queue.enqueue("bad", b"poison", {"k": "v"})
        seen = []
        for _ in range(3):
            (delivery,) = queue.consume("t", 8, 1.0)
            seen.append(queue.fail(delivery, "not finite"))
        assert seen == [Failed.RETRY, Failed.RETRY, Failed.DEAD]
        assert queue.consume("t", 8, 0) == []
        (letter,) = queue.dead_letters()
        assert (letter.item_id, letter.reason, letter.payload, letter.attempts) == ("bad", "not finite", b"poison", 3)
        assert queue.fail(delivery, "again") is Failed.GONE
        depth = queue.depth()
        assert (depth.entries, depth.bytes, depth.pending, depth.dead, depth.counts.dead) == (0, 0, 0, 1, 1)

    def test_reading_again_is_no_failure(self, make: MakeQueue) -> None:
        make().enqueue("a", b"x")
        for _ in range(6):
            (delivery,) = make().consume("t", 8, 0)
        queue = make()
        (delivery,) = queue.consume("t", 8, 0)
        assert queue.fail(delivery, "first") is Failed.RETRY
        assert queue.counts().dead == 0

    def test_failures_are_remembered_across_consumers(self, make: MakeQueue) -> None:
        make().enqueue("a", b"x")
        outcomes = []
        for _ in range(3):
            queue = make()
            (delivery,) = queue.consume("t", 8, 0)
            outcomes.append(queue.fail(delivery, "no"))
        assert outcomes == [Failed.RETRY, Failed.RETRY, Failed.DEAD]

    def test_who_lost_an_entry_cannot_fail_it(self, make: MakeQueue) -> None:
        one, two = make(reclaim_idle_s=0.05, max_attempts=1), make(reclaim_idle_s=0.05, max_attempts=1)
        one.enqueue("a", b"x")
        (held,) = one.consume("one", 8, 0)
        time.sleep(0.1)
        (stolen,) = two.consume("two", 8, 0)
        assert one.fail(held, "late") is Failed.GONE
        assert one.counts().dead == 0
        assert two.fail(stolen, "mine") is Failed.DEAD

    def test_dead_letters_are_bounded_and_their_count_is_kept(self, make: MakeQueue) -> None:
        queue = make(max_dead_letters=3)
        for i in range(5):
            queue.enqueue(str(i), b"x")
            assert queue.dead_letter(queue.consume("t", 1, 0)[0], f"reason {i}") is Failed.DEAD
        assert [letter.item_id for letter in queue.dead_letters()] == ["2", "3", "4"]
        assert queue.depth().dead == 3
        assert queue.counts().dead == 5
        first = queue.dead_letters(count=1)[0]
        assert (first.attempts, first.reason) == (1, "reason 2")
        assert [letter.item_id for letter in queue.dead_letters(after_id=first.id)] == ["3", "4"]
        assert_conserved(queue)

    def test_dead_letters_are_bounded_in_bytes(self, make: MakeQueue) -> None:
        queue = make()
        for i in range(4):
            queue.enqueue(str(i), b"x" * 400_000)
            queue.dead_letter(queue.consume("t", 1, 0)[0], "large")
        assert [letter.item_id for letter in queue.dead_letters()] == ["2", "3"]

    def test_a_lost_group_is_made_again_from_the_beginning(
        self, make: MakeQueue, settings: RedisSettings, run: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue = make()
        queue.enqueue("a", b"x")
        held = queue.consume("t", 8, 0)
        with open_client(settings.url, settings) as client:
            client.delete(*client.keys(f"{{rlhf:{run}}}:*"))
        assert queue.renew(held) == []
        assert queue.fail(held[0], "no") is Failed.GONE
        queue.enqueue("b", b"y")
        with caplog.at_level(logging.WARNING):
            assert [d.item_id for d in queue.consume("t", 8, 2.0)] == ["b"]
        assert "consumer group of the rollouts queue is gone" in caplog.text

    @pytest.mark.parametrize("how", ["acknowledged", "failed", "read again", "reclaimed"])
    def test_entries_that_somebody_deleted_are_counted_lost(
        self, make: MakeQueue, settings: RedisSettings, run: str, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue = make(reclaim_idle_s=0.05)
        queue.enqueue("a", b"xyz")
        held = queue.consume("t", 8, 0)
        with open_client(settings.url, settings) as client:
            client.xdel(RunKeys(run).rollouts.stream, held[0].entry_id)
        if how == "acknowledged":
            assert queue.acknowledge(held) == 1, "its effect happened"
        elif how == "failed":
            assert queue.fail(held[0], "no") is Failed.GONE
        else:
            assert make(reclaim_idle_s=0.05).consume("t" if how == "read again" else "u", 8, 0.3) == []
        counts = queue.counts()
        assert (counts.lost, counts.acknowledged) == ((0, 1) if how == "acknowledged" else (1, 0))
        assert (queue.depth().bytes, queue.depth().pending) == (0, 0)
        assert_conserved(queue)
        assert ("deleted or trimmed" in caplog.text) == (how != "acknowledged")

    def test_consume_waits_past_one_block_and_ends_at_its_deadline(self, make: MakeQueue) -> None:
        queue = make()
        began = time.monotonic()
        assert queue.consume("t", 8, 0.8) == []
        assert 0.7 < time.monotonic() - began < 2.5
        timer = threading.Timer(0.7, lambda: make().enqueue("late", b"x"))
        timer.start()
        assert [d.item_id for d in queue.consume("t", 8, 10.0)] == ["late"]
        assert time.monotonic() - began < 6
        timer.join()

    def test_consume_can_be_stopped(self, make: MakeQueue) -> None:
        stop = threading.Event()
        threading.Timer(0.2, stop.set).start()
        began = time.monotonic()
        assert make().consume("t", 8, 30.0, stop) == []
        assert time.monotonic() - began < 3

    def test_an_owner_that_was_replaced_can_do_nothing(self, make: MakeQueue) -> None:
        old = make()
        old.take_over()
        for name in "abc":
            old.enqueue(name, b"x")
        held = old.consume("trainer", 2, 0)
        new = make()
        new.take_over()
        for act in (
            lambda: old.acknowledge(held),
            lambda: old.fail(held[0], "no"),
            lambda: old.renew(held),
            lambda: old.consume("trainer", 8, 0),
        ):
            with pytest.raises(StageFailed, match="another process has taken over the rollouts queue"):
                act()
        assert [d.item_id for d in new.consume("trainer", 8, 0)] == ["a", "b"]
        assert new.acknowledge(held) == 2

    def test_a_lost_reply_of_enqueue_leaves_one_entry(self, make: MakeQueue, settings: RedisSettings, tmp_path: Path):
        with Proxy(settings.url, tmp_path) as proxy:
            queue = make(proxy.url)
            queue.enqueue("warm", b"x")
            proxy.lose_reply_of(b"EVALSHA", times=2)
            assert queue.enqueue("a", b"x") is Enqueued.ADDED
            assert proxy.lost == 2
            assert queue.depth().entries == 2
            assert queue.enqueue("a", b"x") is Enqueued.DUPLICATE

    def test_a_lost_reply_of_a_read_loses_nothing(self, make: MakeQueue, settings: RedisSettings, tmp_path: Path):
        with Proxy(settings.url, tmp_path) as proxy:
            queue = make(proxy.url)
            queue.consume("t", 8, 0)
            for i in range(4):
                queue.enqueue(str(i), b"x")
            assert [d.item_id for d in queue.consume("t", 1, 0)] == ["0"]
            proxy.lose_reply_of(b"XREADGROUP")
            got = [d.item_id for _ in range(3) for d in queue.consume("t", 2, 1.0)]
            assert proxy.lost == 1
            assert got == ["1", "2", "3"], "each once, and what is in hand not again"

    def test_a_lost_reply_of_a_reclaim_loses_nothing(self, make: MakeQueue, settings: RedisSettings, tmp_path: Path):
        make().enqueue("a", b"x")
        make().consume("dead", 8, 0)
        time.sleep(0.35)
        with Proxy(settings.url, tmp_path) as proxy:
            proxy.lose_reply_of(b"XAUTOCLAIM")
            assert [d.item_id for d in make(proxy.url).consume("t", 8, 1.0)] == ["a"]
            assert proxy.lost == 1

    def test_lost_replies_of_settling_count_once(self, make: MakeQueue, settings: RedisSettings, tmp_path: Path):
        with Proxy(settings.url, tmp_path) as proxy:
            queue = make(proxy.url)
            for i in range(2):
                queue.enqueue(str(i), b"x")
            first, second = queue.consume("t", 8, 0)
            proxy.lose_reply_of(b"EVALSHA")
            queue.acknowledge([first])
            queue.renew([second])
            queue.fail(second, "one")
            proxy.lose_reply_of(b"EVALSHA")
            assert queue.fail(*queue.consume("t", 8, 1.0), "two") is Failed.RETRY, "not three"
            assert proxy.lost == 2
            assert queue.counts().acknowledged == 1
            assert_conserved(queue)

    def test_nothing_is_lost_or_doubled_when_the_server_is_killed(self, server: EmbeddedRedis, make: MakeQueue) -> None:
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("appendfsync") == {"appendfsync": "no"}, "else the last moments may be lost"

        def make_patient() -> Queue:
            return make(reclaim_idle_s=5.0, max_entries=200)

        ledger = torture(server, make_patient, kills=self.torture_kills, every_s=0.25, seed=1)
        assert ledger.errors == []
        assert len(ledger.confirmed) > 100
        assert set(ledger.effects) == ledger.confirmed
        assert set(ledger.effects.values()) == {1}, "a repeated delivery says that it is one"
        depth = make().depth()
        assert (depth.entries, depth.bytes, depth.pending) == (0, 0, 0)
        assert (depth.counts.added, depth.counts.acknowledged) == (len(ledger.confirmed), len(ledger.confirmed))
