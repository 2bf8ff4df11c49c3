"""A bounded queue on a Redis Stream: at least once, nothing dropped to make room, every entry accounted for.

A producer enqueues under an id that it can name again after a crash; the same id is added once. A consumer reads under
a stable name, in this order: what it was given before and may never have seen (after its start, and after every
connection error, because a lost reply leaves entries delivered to nobody), then what another consumer has held too
long, then what is new. An entry leaves when it is acknowledged, or when it has failed too often and goes to the dead
letters. Redis' own delivery count rises with every re-read, so failures have a counter of their own.

Threads: one Queue may be shared; `consume` takes one caller at a time, the rest any number.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import redis

from rlhf.errors import RequestError, StageFailed, Unavailable
from rlhf.queues import scripts
from rlhf.queues.connection import MAX_BLOCK_S, patiently
from rlhf.queues.deliveries import (
    DeadLetter,
    Delivery,
    Enqueued,
    Failed,
    QueueCounts,
    QueueDepth,
    as_dead_letter,
)
from rlhf.queues.keys import QueueKeys, RunKeys
from rlhf.queues.reader import GroupReader, group_is_missing, make_group
from rlhf.queues.settings import RedisSettings

__all__ = [
    "DeadLetter",
    "Delivery",
    "Enqueued",
    "Failed",
    "Queue",
    "QueueCounts",
    "QueueDepth",
    "prompts_queue",
    "rollouts_queue",
]

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 256 * 2**20
"""Redis closes the connection on values over 512 MiB; a client that tries again would do so for ever."""
_RESERVED = frozenset({"id", "p", "reason", "attempts", "entry", "size"})

T = TypeVar("T")
ScriptArgument = bytes | str | int
Stop = threading.Event | None


class Queue:
    """One stream and its one consumer group. Build with `prompts_queue` or `rollouts_queue`.

    Every method bears with a Redis that is away, and raises Unavailable after `redis.connect_timeout_s` of that.
    """

    def __init__(self, client: redis.Redis, keys: QueueKeys, group: str, settings: RedisSettings) -> None:
        self.keys = keys
        self.group = group
        self.max_bytes = settings.max_mib * 2**20
        self._client = client
        self._settings = settings
        self._fence = ""
        self._made_group = False
        self._readers: dict[str, GroupReader] = {}
        self._lock = threading.Lock()
        self._consuming = threading.Lock()
        self._enqueue = client.register_script(scripts.ENQUEUE)
        self._settle = client.register_script(scripts.SETTLE)
        self._fail = client.register_script(scripts.FAIL)
        self._renew = client.register_script(scripts.RENEW)
        self._depth = client.register_script(scripts.DEPTH)

    def enqueue(self, item_id: str, payload: bytes, fields: Mapping[str, str] | None = None) -> Enqueued:
        """Adds an entry, once however often it is called with the same id.

        Raises:
            RequestError: the payload alone is more than the queue may hold, or a field's name is taken.
        """
        self._check_payload(item_id, payload)
        extra = [part for name, value in (fields or {}).items() for part in (name, value)]
        if _RESERVED & set(extra[::2]):
            raise RequestError(f"{self.keys.name} queue: fields may not be named {sorted(_RESERVED)}")
        limits = (self._settings.max_entries, self.max_bytes, max(1, round(self._settings.dedupe_s * 1000)))
        keys = [self.keys.stream, self.keys.counts, self.keys.sizes, self.keys.seen(item_id)]
        args: list[ScriptArgument] = [item_id, payload, *limits, secrets.token_hex(8), *extra]
        try:
            self._make_group_once()
            return Enqueued(self._patiently(lambda: self._enqueue(keys, args)))
        except redis.ResponseError as error:
            if "command not allowed when used memory" not in str(error):
                raise
            log.warning("the server's memory is full, so the %s queue takes nothing now (%s)", self.keys.name, error)
            return Enqueued.FULL

    def consume(self, consumer: str, count: int, block_s: float, stop: Stop = None) -> list[Delivery]:
        """Up to `count` entries, fewer when there are fewer, none when none came within `block_s`.

        An entry is delivered once to one Queue object, and again only after `fail` answered RETRY, after `renew` found
        it taken, or to another process.

        Args:
            consumer: stable name; a process that starts again under it gets what it had.
            block_s: how long to wait for a first entry. While Redis is away it may take up to
                `redis.connect_timeout_s` longer.
            stop: when set, returns within half a second.

        Raises:
            StageFailed: another owner has taken the queue over.
        """
        deadline = time.monotonic() + block_s
        with self._consuming:
            reader = self._reader(consumer)
            while True:
                left_s = max(0.0, deadline - time.monotonic())
                found = self._consume_once(reader, count, left_s, stop)
                if found or left_s == 0.0 or (stop is not None and stop.is_set()):
                    return found

    def acknowledge(self, deliveries: Sequence[Delivery]) -> int:
        """Done with these, for good. Returns how many were still pending: 0 for a repeated acknowledgement.

        Raises:
            StageFailed: another owner has taken the queue over; nothing was acknowledged.
        """
        settled = self._settle_as("acknowledged", [delivery.entry_id for delivery in deliveries])
        self._forget(deliveries)
        return settled

    def fail(self, delivery: Delivery, reason: str) -> Failed:
        """Counts a failure. The entry is delivered again, or is a dead letter from `redis.max_attempts` failures on."""
        return self._fail_at(delivery, reason, self._settings.max_attempts)

    def dead_letter(self, delivery: Delivery, reason: str) -> Failed:
        """Gives an entry up at once, for what no second try can mend."""
        return self._fail_at(delivery, reason, 0)

    def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Holds entries for another `redis.reclaim_idle_s`. Returns those that are still this consumer's; of the
        others, work may be dropped: somebody else has them, or has settled them."""
        kept: set[str] = set()
        for consumer in {delivery.consumer for delivery in deliveries}:
            ids = [delivery.entry_id for delivery in deliveries if delivery.consumer == consumer]
            kept.update(self._renew_as(consumer, ids))
        self._forget([delivery for delivery in deliveries if delivery.entry_id not in kept])
        return [delivery for delivery in deliveries if delivery.entry_id in kept]

    def dead_letters(self, after_id: str = "0-0", count: int = 100) -> list[DeadLetter]:
        """The next dead letters after the one with `after_id`, oldest first."""
        found = self._patiently(lambda: self._client.xrange(self.keys.dead, min=f"({after_id}", count=count))
        return [as_dead_letter(entry_id, entry) for entry_id, entry in cast(Any, found)]

    def depth(self) -> QueueDepth:
        keys = [self.keys.stream, self.keys.counts, self.keys.dead]
        entries, pending, age_ms, kept, *counts = self._patiently(lambda: self._depth(keys, [self.group]))
        held_bytes, added, acknowledged, dead, lost = (int(value or 0) for value in counts)
        conserved = QueueCounts(added, acknowledged, dead, lost)
        return QueueDepth(entries, held_bytes, pending, age_ms / 1000, kept, conserved)

    def counts(self) -> QueueCounts:
        return self.depth().counts

    def take_over(self) -> None:
        """Makes this object the queue's only owner: whoever owned it before can settle and consume no more.

        For a queue with a single consumer whose effects may not fork, the trainer's: one that was paused, replaced and
        woken again must not acknowledge what its successor has not trained on.
        """
        self._fence = str(self._patiently(lambda: self._client.incr(self.keys.fence)))

    def _make_group_once(self) -> None:
        """Before the first entry, because a server whose memory is full makes no group, and so could not be emptied."""
        if not self._made_group:
            self._patiently(lambda: make_group(self._client, self.keys, self.group))
            self._made_group = True

    def _check_payload(self, item_id: str, payload: bytes) -> None:
        limit = min(self.max_bytes, MAX_PAYLOAD_BYTES)
        if len(payload) > limit:
            raise RequestError(
                f"{self.keys.name} queue: {item_id} has {len(payload)} bytes and could never be queued, the limit is "
                f"{limit}; raise redis.max_mib (to {MAX_PAYLOAD_BYTES // 2**20} at most) or make it smaller"
            )

    def _consume_once(self, reader: GroupReader, count: int, left_s: float, stop: Stop) -> list[Delivery]:
        block_s = min(left_s, MAX_BLOCK_S)
        try:
            return self._patiently(lambda: self._read(reader, count, block_s), on_error=reader.read_again, stop=stop)
        except Unavailable:
            if stop is not None and stop.is_set():
                return []
            raise

    def _read(self, reader: GroupReader, count: int, block_s: float) -> list[Delivery]:
        self._check_fence()
        return reader.read(count, block_s)

    def _report_vanished(self, entry_ids: list[str]) -> None:
        log.error(
            "%d entries of the %s queue were deleted or trimmed before they were acknowledged, such as %s; see who "
            "else writes to this Redis",
            len(entry_ids),
            self.keys.name,
            entry_ids[0],
        )
        self._settle_as("lost", entry_ids)

    def _settle_as(self, counter: str, entry_ids: Sequence[str]) -> int:
        if not entry_ids:
            return 0
        keys = [self.keys.stream, self.keys.counts, self.keys.sizes, self.keys.attempts, self.keys.fence]
        settled = self._patiently(lambda: self._settle(keys, [self.group, self._fence, counter, *entry_ids]))
        if settled == scripts.FENCED:
            raise self._fenced()
        return int(settled)

    def _fail_at(self, delivery: Delivery, reason: str, attempts: int) -> Failed:
        keys = [
            self.keys.stream,
            self.keys.counts,
            self.keys.sizes,
            self.keys.attempts,
            self.keys.fence,
            self.keys.dead,
        ]
        args: list[ScriptArgument] = [
            self.group,
            self._fence,
            delivery.consumer,
            delivery.entry_id,
            reason,
            attempts,
            secrets.token_hex(8),
        ]
        args += [self._settings.max_dead_letters, self.max_bytes]
        reply = self._unless_group_is_missing(lambda: self._fail(keys, args), b"GONE").decode()
        if reply == "FENCED":
            raise self._fenced()
        self._forget([delivery])
        if reply == "VANISHED":
            self._report_vanished([delivery.entry_id])
            return Failed.GONE
        if reply == Failed.RETRY.value:
            self._reader(delivery.consumer).read_again()
        return Failed(reply)

    def _renew_as(self, consumer: str, entry_ids: Sequence[str]) -> set[str]:
        args = [self.group, self._fence, consumer, *entry_ids]
        keys = [self.keys.stream, self.keys.fence]
        kept = self._unless_group_is_missing(lambda: self._renew(keys, args), [])
        if kept == scripts.FENCED:
            raise self._fenced()
        return {entry_id.decode() for entry_id in kept}

    def _check_fence(self) -> None:
        if self._fence and cast(Any, self._client.get(self.keys.fence)) != self._fence.encode():
            raise self._fenced()

    def _fenced(self) -> StageFailed:
        return StageFailed(
            f"another process has taken over the {self.keys.name} queue, so this one must end; "
            "see that only one trainer runs for this run"
        )

    def _reader(self, consumer: str) -> GroupReader:
        with self._lock:
            if consumer not in self._readers:
                idle_s = self._settings.reclaim_idle_s
                self._readers[consumer] = GroupReader(
                    self._client, self.keys, self.group, consumer, idle_s, self._report_vanished
                )
            return self._readers[consumer]

    def _forget(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._reader(delivery.consumer).forget(delivery.entry_id)

    def _unless_group_is_missing(self, call: Callable[[], Any], otherwise: Any) -> Any:
        """Nothing is pending in a group that is not there; the next `consume` makes it again."""
        try:
            return self._patiently(call)
        except redis.ResponseError as error:
            if not group_is_missing(error):
                raise
            return otherwise

    def _patiently(
        self,
        call: Callable[[], T],
        on_error: Callable[[], None] | None = None,
        stop: Stop = None,
    ) -> T:
        return patiently(call, timeout_s=self._settings.connect_timeout_s, what="Redis", on_error=on_error, stop=stop)


def prompts_queue(client: redis.Redis, run: str, settings: RedisSettings) -> Queue:
    """PromptTask, from the trainer's prompt source to the rollout workers."""
    return Queue(client, RunKeys(run).prompts, "workers", settings)


def rollouts_queue(client: redis.Redis, run: str, settings: RedisSettings) -> Queue:
    """Rollout, from the rollout workers to the trainer."""
    return Queue(client, RunKeys(run).rollouts, "trainer", settings)
