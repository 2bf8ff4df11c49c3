"""What a queue hands out and says about itself. Import these from `rlhf.queues.streams`, beside the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from rlhf.queues import scripts


class Enqueued(Enum):
    ADDED = scripts.ADDED
    DUPLICATE = scripts.DUPLICATE
    """The id was enqueued before, within `redis.dedupe_s`."""
    FULL = scripts.FULL
    """At the limit of entries or bytes, or the server's memory is; try again later."""


class Failed(Enum):
    RETRY = "RETRY"
    """The entry will be delivered again."""
    DEAD = "DEAD"
    """The entry is among the dead letters now."""
    GONE = "GONE"
    """The entry was no longer this consumer's: acknowledged, dead, or taken by another."""


@dataclass(frozen=True)
class Delivery:
    """An entry in a consumer's hand."""

    entry_id: str
    """Redis' id of the stream entry."""
    item_id: str
    """The producer's id."""
    payload: bytes
    redelivered: bool
    """Somebody was given it before, and may have worked on it."""
    consumer: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class DeadLetter:
    id: str
    """Position among the dead letters; rises."""
    item_id: str
    reason: str
    payload: bytes
    attempts: int
    """Failures counted, the last included."""


@dataclass(frozen=True)
class QueueCounts:
    """Since the run began; added = acknowledged + dead + lost + depth().entries, at any instant."""

    added: int
    acknowledged: int
    dead: int
    lost: int
    """Entries that vanished from the stream without this program; anything but 0 is a fault of the server's set-up."""


@dataclass(frozen=True)
class QueueDepth:
    entries: int
    """Waiting or in hand."""
    bytes: int
    """Payload bytes of those."""
    pending: int
    """In hand."""
    oldest_age_s: float
    """Of the oldest entry; 0 when there is none."""
    dead: int
    """Dead letters kept."""
    counts: QueueCounts
    """Of the same instant."""


def as_delivery(entry_id: str, fields: Mapping[bytes, bytes], consumer: str, redelivered: bool) -> Delivery:
    """An entry without our fields (somebody else wrote it) has an empty payload, which no reader accepts."""
    further = {_text(name): _text(value) for name, value in fields.items() if name not in (b"id", b"p")}
    return Delivery(entry_id, _text(fields.get(b"id", b"")), fields.get(b"p", b""), redelivered, consumer, further)


def as_dead_letter(entry_id: bytes, fields: Mapping[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        id=entry_id.decode(),
        item_id=_text(fields.get(b"id", b"")),
        reason=_text(fields[b"reason"]),
        payload=fields.get(b"p", b""),
        attempts=int(fields[b"attempts"]),
    )


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
