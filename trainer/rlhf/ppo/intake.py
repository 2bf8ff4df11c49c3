"""What comes off the rollouts stream: judged by the ledger, buffered for a step, acknowledged when durable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from google.protobuf.message import DecodeError

from rlhf.errors import DeadlineExceeded, RequestError, StageFailed
from rlhf.ppo.ledger import Ledger, Verdict
from rlhf.queues.streams import Delivery, Queue
from rlhf.v1 import rollout_pb2
from rlhf.wire.blobs import remove_blob
from rlhf.wire.messages import from_rollout
from rlhf.wire.records import Blob, Rollout

log = logging.getLogger(__name__)

POLL_S = 1.0
SEND_AGAIN_S = 15.0
"""A step that has waited this long without an arrival has its prompts sent once more: a Redis that was killed on a slow
disk may have lost the last moments. What was not lost is recognised by its id."""


class Intake:
    """
    Args:
        timeout_s: how long no rollout may arrive while a step waits for one.
        keep_going: called about every second while waiting; raises what should end the wait.
        hold: called before a batch is looked for; returns once the trainer may go on.
        blobs: folder of hidden states too large for a message; those of a rollout go when it is acknowledged.
    """

    def __init__(
        self,
        rollouts: Queue,
        prompts: Queue,
        ledger: Ledger,
        *,
        consumer: str,
        timeout_s: float,
        keep_going: Callable[[], None],
        hold: Callable[[], None] = lambda: None,
        blobs: Path | None = None,
    ) -> None:
        self.rollouts = rollouts
        self.prompts = prompts
        self.ledger = ledger
        self.consumer = consumer
        self.timeout_s = timeout_s
        self.keep_going = keep_going
        self.hold = hold
        self.blobs = blobs
        self._blobs_of: dict[str, list[Blob]] = {}
        """By entry id: what of a delivery not acknowledged yet lies in files."""
        self._buffer: dict[str, Rollout] = {}
        self._held: dict[str, Delivery] = {}
        """By entry id: every delivery not acknowledged yet."""
        self._early: dict[str, tuple[Rollout, Delivery]] = {}
        self._letters: dict[str, str] = {}
        """Reasons of dead letters whose prompts this ledger has not issued yet, by rollout id."""
        self._settled: set[str] = set()
        """Entry ids of those whose outcome is in the ledger, and can be acknowledged once that is durable."""
        self._letters_read = {prompts.keys.name: "0-0", rollouts.keys.name: "0-0"}
        """Per stream, the last dead letter that was read."""

    @property
    def waiting(self) -> int:
        """Rollouts in the buffer."""
        return len(self._buffer)

    @property
    def unacknowledged_bytes(self) -> int:
        return sum(len(self._held[entry_id].payload) for entry_id in self._settled)

    @property
    def unacknowledged_entries(self) -> int:
        return len(self._settled)

    def next_batch(self, count: int) -> list[Rollout]:
        """`count` rollouts to train on, by prompt index, whatever order they arrived in.

        Raises:
            DeadlineExceeded: none arrived for `timeout_s`.
            StageFailed: as many prompts as a batch has were abandoned while waiting.
        """
        self.keep_going()
        self.hold()
        abandoned_before = len(self.ledger.abandoned)
        now = time.monotonic()
        deadline, send_again_at = now + self.timeout_s, now + SEND_AGAIN_S
        while len(self._fresh()) < count:
            self.keep_going()
            arrived = self._take(self.rollouts.consume(self.consumer, count=64, block_s=POLL_S)) + self._reconsider()
            self._watch_dead_letters()
            self._check_abandoned(abandoned_before, count)
            now = time.monotonic()
            if arrived:
                deadline, send_again_at = now + self.timeout_s, now + SEND_AGAIN_S
            elif now > send_again_at:
                self.ledger.send_again()
                send_again_at = now + SEND_AGAIN_S
            if now > deadline:
                raise DeadlineExceeded(
                    f"no rollout arrived for {self.timeout_s:.0f} s; the step has {self.waiting} of {count}, and "
                    f"{len(self.ledger.outstanding)} prompts are out; see `rlhf status` for what waits for what"
                )
        return sorted(self._buffer.values(), key=lambda rollout: rollout.prompt_index)[:count]

    def trained(self, batch: list[Rollout]) -> None:
        """The batch is in the weights and in the ledger."""
        for rollout in batch:
            del self._buffer[rollout.rollout_id]
        known = {rollout.rollout_id for rollout in batch}
        self._settled |= {entry_id for entry_id, delivery in self._held.items() if delivery.item_id in known}

    def acknowledge(self) -> int:
        """Let go of everything settled; call when the ledger that knows its outcome is durable."""
        settled = [self._held.pop(entry_id) for entry_id in self._settled]
        self._settled.clear()
        acknowledged = self.rollouts.acknowledge(settled) if settled else 0
        self._remove_blobs(delivery.entry_id for delivery in settled)
        return acknowledged

    def drain(self, timeout_s: float) -> None:
        """After the last step: settle what restarts left over, until both streams are empty."""
        deadline = time.monotonic() + timeout_s
        while self.prompts.depth().entries or self.rollouts.depth().entries > len(self._held):
            self._take(self.rollouts.consume(self.consumer, count=64, block_s=POLL_S))
            if time.monotonic() > deadline:
                log.warning("the streams still hold entries that no step needs; `rlhf audit` will show them")
                break
        for rollout in [*self._buffer.values(), *(rollout for rollout, _ in self._early.values())]:
            self.ledger.mark_unused(rollout)
        self._buffer.clear()
        self._early.clear()
        self._settled = set(self._held)

    def _remove_blobs(self, entry_ids: Iterable[str]) -> None:
        for blob in [blob for entry_id in entry_ids for blob in self._blobs_of.pop(entry_id, [])]:
            if self.blobs is not None:
                remove_blob(self.blobs, blob)

    def _fresh(self) -> dict[str, Rollout]:
        """The buffer without what has become stale in it."""
        for rollout in list(self._buffer.values()):
            if self.ledger.judge(rollout) is Verdict.STALE:
                del self._buffer[rollout.rollout_id]
                self.ledger.mark_stale(rollout)
                self._settled |= {e for e, d in self._held.items() if d.item_id == rollout.rollout_id}
        return self._buffer

    def _take(self, deliveries: list[Delivery]) -> int:
        """How many of them can be trained on."""
        arrived = 0
        for delivery in deliveries:
            try:
                rollout = from_rollout(rollout_pb2.Rollout.FromString(delivery.payload))
            except (DecodeError, RequestError, ValueError) as error:
                self._reject(delivery, f"cannot be used: {error}")
                continue
            self._held[delivery.entry_id] = delivery
            self._blobs_of[delivery.entry_id] = blobs_of(rollout)
            arrived += self._sort_in(rollout, delivery)
        return arrived

    def _sort_in(self, rollout: Rollout, delivery: Delivery) -> bool:
        verdict = self.ledger.judge(rollout)
        if verdict is Verdict.EARLY:
            self._early[rollout.rollout_id] = (rollout, delivery)
            return False
        if verdict is Verdict.TRAIN and rollout.rollout_id not in self._buffer:
            self._buffer[rollout.rollout_id] = rollout
            return True
        if verdict is Verdict.STALE:
            log.info("rollout %s is stale (%s); its prompt goes out again", rollout.rollout_id, rollout.versions[:1])
            self.ledger.mark_stale(rollout)
        elif verdict is Verdict.KNOWN:
            self.ledger.mark_known(rollout)
        self._settled.add(delivery.entry_id)
        return False

    def _reconsider(self) -> int:
        """Sort in what was early. How many of them can be trained on."""
        early, self._early = self._early, {}
        return sum(self._sort_in(rollout, delivery) for rollout, delivery in early.values())

    def _reject(self, delivery: Delivery, reason: str) -> None:
        log.warning("rollout %s %s", delivery.item_id, reason)
        self.rollouts.dead_letter(delivery, reason)

    def _watch_dead_letters(self) -> None:
        for queue in (self.prompts, self.rollouts):
            for letter in queue.dead_letters(self._letters_read[queue.keys.name]):
                self._letters_read[queue.keys.name] = letter.id
                self._letters[letter.item_id] = letter.reason
        for rollout_id, reason in list(self._letters.items()):
            verdict = self.ledger.mark_dead(rollout_id, reason)
            if verdict is not Verdict.EARLY:
                del self._letters[rollout_id]
            if verdict is Verdict.DEAD:
                log.warning("%s failed and goes out again: %s", rollout_id, reason)

    def _check_abandoned(self, before: int, count: int) -> None:
        abandoned = len(self.ledger.abandoned) - before
        if abandoned >= count:
            reason = list(self.ledger.abandoned.values())[-1]
            raise StageFailed(f"{abandoned} prompts failed one after another; the last because: {reason}")


def blobs_of(rollout: Rollout) -> list[Blob]:
    """What of it lies in files."""
    contents = (c.ref_hidden.content for c in rollout.completions if c.ref_hidden is not None)
    return [content for content in contents if isinstance(content, Blob)]
