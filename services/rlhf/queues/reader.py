"""How one consumer reads its group: what it may have missed, then what others held too long, then what is new."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import redis

from rlhf.queues.deliveries import Delivery, as_delivery
from rlhf.queues.keys import QueueKeys

log = logging.getLogger(__name__)

_START = "0-0"
Entries = Sequence[tuple[bytes | None, Mapping[bytes, bytes] | None]]
"""As redis-py answers. No id: an entry that vanished, in XAUTOCLAIM's reply of 6.2. No fields: one that vanished."""


class GroupReader:
    """Reads under one consumer name, and remembers what is in the caller's hand so as to deliver it once.

    `read` is for one thread at a time; `read_again` and `forget` for any.

    Args:
        idle_s: entries that their consumer has held this long are taken over.
        on_vanished: told the ids of entries that were deleted before they were settled.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: QueueKeys,
        group: str,
        consumer: str,
        idle_s: float,
        on_vanished: Callable[[list[str]], None],
    ) -> None:
        self._client = client
        self._keys = keys
        self._group = group
        self._consumer = consumer
        self._idle_s = idle_s
        self._on_vanished = on_vanished
        self._in_hand: set[str] = set()
        self._lock = threading.Lock()
        self._missed = threading.Event()
        self._missed.set()
        self._own_cursor: str | None = None
        self._reclaim_cursor = _START
        self._reclaimed_at = float("-inf")
        self._has_read = False

    def read_again(self) -> None:
        """The next read begins with the pending entries that are not in hand: a reply may have been lost."""
        self._missed.set()

    def forget(self, entry_id: str) -> None:
        """The entry is no longer in the caller's hand."""
        with self._lock:
            self._in_hand.discard(entry_id)

    def read(self, count: int, block_s: float) -> list[Delivery]:
        """One pass. Any redis error may come out; after one of connection, call `read_again`."""
        try:
            found = self._read_pass(count, block_s)
        except redis.ResponseError as error:
            if not group_is_missing(error):
                raise
            if self._has_read:
                log.warning(
                    "the consumer group of the %s queue is gone, as after a loss of the server's data; making it "
                    "again and reading what there is from the beginning",
                    self._keys.name,
                )
            make_group(self._client, self._keys, self._group)
            self.read_again()
            found = self._read_pass(count, block_s)
        self._has_read = True
        return found

    def _read_pass(self, count: int, block_s: float) -> list[Delivery]:
        return self._read_own(count) or self._reclaim(count) or self._read_new(count, block_s)

    def _read_own(self, count: int) -> list[Delivery]:
        """Pending entries of this consumer that are not in hand."""
        if self._missed.is_set():
            self._missed.clear()
            self._own_cursor = _START
        while self._own_cursor is not None:
            entries = self._xreadgroup(self._own_cursor, count, None)
            self._own_cursor = cast(bytes, entries[-1][0]).decode() if entries else None
            vanished = [entry_id.decode() for entry_id, fields in entries if entry_id is not None and not fields]
            if vanished:
                self._on_vanished(vanished)
            found = self._deliver(entries, redelivered=True)
            if found:
                return found
        return []

    def _reclaim(self, count: int) -> list[Delivery]:
        """Entries that somebody has held too long. Ones in this caller's hand are renewed by it, not delivered."""
        if self._reclaim_cursor == _START and time.monotonic() - self._reclaimed_at < self._idle_s / 4:
            return []
        idle_ms = round(self._idle_s * 1000)
        reply = cast(
            Any,
            self._client.xautoclaim(
                self._keys.stream, self._group, self._consumer, idle_ms, self._reclaim_cursor, count=count
            ),
        )
        self._reclaim_cursor = reply[0].decode()
        self._reclaimed_at = time.monotonic()
        entries: Entries = reply[1]
        if len(reply) > 2 and reply[2]:  # from 7.0 on; these are no longer pending either
            self._on_vanished([entry_id.decode() for entry_id in reply[2]])
        found = self._deliver(entries, redelivered=True)
        if any(entry_id is None for entry_id, _ in entries):
            self.read_again()
            return found or self._read_own(count)  # which says what 6.2 does not: the id of what vanished
        return found

    def _read_new(self, count: int, block_s: float) -> list[Delivery]:
        block_ms = max(1, round(block_s * 1000)) if block_s > 0 else None  # BLOCK 0 would be for ever
        return self._deliver(self._xreadgroup(">", count, block_ms), redelivered=False)

    def _xreadgroup(self, after: str, count: int, block_ms: int | None) -> Entries:
        streams = {self._keys.stream: after}
        reply = cast(
            Any,
            self._client.xreadgroup(self._group, self._consumer, cast(Any, streams), count=count, block=block_ms),
        )
        return cast(Entries, reply[0][1]) if reply else []

    def _deliver(self, entries: Entries, *, redelivered: bool) -> list[Delivery]:
        with self._lock:
            found = [
                as_delivery(entry_id.decode(), fields, self._consumer, redelivered)
                for entry_id, fields in entries
                if entry_id is not None and fields and entry_id.decode() not in self._in_hand
            ]
            self._in_hand.update(delivery.entry_id for delivery in found)
        return found


def make_group(client: redis.Redis, keys: QueueKeys, group: str) -> None:
    """From the first entry on, unless it is there already."""
    try:
        client.xgroup_create(keys.stream, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def group_is_missing(error: redis.ResponseError) -> bool:
    return "NOGROUP" in str(error)
