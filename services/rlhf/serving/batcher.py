"""Dynamic batching: items of all calls, in the order they came, in batches bounded by items and padded tokens.

    submit ──▶ waiting items ──▶ next batch ──▶ forward in the worker thread ──▶ each item's answer
                  │ bounded: Overloaded, with the time until there is room
                  └ items whose call was cancelled or ran out of time leave before the forward

While one batch is computed the next gathers, so batches grow under load by themselves; `max_delay_s` is what a lone
item waits for company.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf.errors import Overloaded, RequestError, RlhfError
from rlhf.serving.worker_thread import WorkerThread

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Limits:
    max_batch_size: int
    """Items in one forward pass, and in one call."""
    max_batch_tokens: int
    """Padded tokens in one forward pass: its items times its longest."""
    max_waiting_items: int
    """Items that may wait."""
    max_delay_s: float
    """Time that an item waits for others."""


@dataclass(frozen=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    length: int
    arrived_s: float
    answer: asyncio.Future[Answer]


class Batcher(Generic[Item, Answer]):
    """Belongs to one event loop. Its work is done by `running`, which must be entered for the time of its use."""

    def __init__(
        self,
        worker: WorkerThread,
        forward: Callable[[Sequence[Item]], Sequence[Answer]],
        limits: Limits,
        *,
        length: Callable[[Item], int],
    ) -> None:
        """
        Args:
            forward: called in the worker thread with 1..max_batch_size items; one answer each, in their order.
            length: tokens of an item.
        """
        self._worker = worker
        self._forward = forward
        self._limits = limits
        self._length = length
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._arrived = asyncio.Event()
        self._seconds_per_item = 0.01

    async def submit(self, items: Sequence[Item]) -> list[Answer]:
        """The answers to one call's items, in their order.

        Raises:
            RequestError: more items, or a longer one, than a forward pass takes.
            Overloaded: too much is waiting.
            Whatever `forward` raised on a batch with one of the items.
        """
        lengths = [self._length(item) for item in items]
        self._check(lengths)
        loop = asyncio.get_running_loop()
        now_s = time.monotonic()
        waiting = [
            _Waiting(item, length, now_s, loop.create_future()) for item, length in zip(items, lengths, strict=True)
        ]
        self._waiting.extend(waiting)
        self._arrived.set()
        # gather cancels every item's future when the call is cancelled; `_next_batch` then leaves the items out.
        return list(await asyncio.gather(*(entry.answer for entry in waiting)))

    @asynccontextmanager
    async def running(self, on_failure: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Batches until the context is left.

        Args:
            on_failure: told if batching itself breaks, which ends it: usually `Server.fail`.
        """
        task = asyncio.create_task(self._run())
        task.add_done_callback(lambda ended: _report(ended, on_failure))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    def _check(self, lengths: Sequence[int]) -> None:
        limits = self._limits
        if len(lengths) > limits.max_batch_size:
            raise RequestError(
                f"{len(lengths)} items in one call and max_batch_size is {limits.max_batch_size}; send several calls"
            )
        if max(lengths, default=0) > limits.max_batch_tokens:
            raise RequestError(f"an item of {max(lengths)} tokens, and max_batch_tokens is {limits.max_batch_tokens}")
        self._leave_out_cancelled()
        waiting = len(self._waiting)
        if waiting and waiting + len(lengths) > limits.max_waiting_items:
            raise Overloaded(
                f"{waiting} items are waiting and max_waiting_items is {limits.max_waiting_items}; try again later",
                retry_after_s=max(0.01, waiting * self._seconds_per_item),
            )

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if self._waiting and not self._full():
                await asyncio.sleep(self._waiting[0].arrived_s + self._limits.max_delay_s - time.monotonic())
            if batch := self._next_batch():
                await self._compute(batch)
            if not self._waiting:
                self._arrived.clear()

    def _full(self) -> bool:
        longest = max((entry.length for entry in self._waiting), default=0)
        limits = self._limits
        return len(self._waiting) >= limits.max_batch_size or longest * len(self._waiting) >= limits.max_batch_tokens

    def _next_batch(self) -> list[_Waiting[Item, Answer]]:
        self._leave_out_cancelled()
        batch: list[_Waiting[Item, Answer]] = []
        longest = 0
        while self._waiting and len(batch) < self._limits.max_batch_size:
            longest = max(longest, self._waiting[0].length)
            if longest * (len(batch) + 1) > self._limits.max_batch_tokens:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _leave_out_cancelled(self) -> None:
        if any(entry.answer.done() for entry in self._waiting):
            self._waiting = deque(entry for entry in self._waiting if not entry.answer.done())

    async def _compute(self, batch: list[_Waiting[Item, Answer]]) -> None:
        began = time.monotonic()
        try:
            answers = await self._worker.run(self._forward, [entry.item for entry in batch])
            if len(answers) != len(batch):
                raise RlhfError(f"{len(answers)} answers to a batch of {len(batch)} items")
        except Exception as error:
            for entry in batch:
                if not entry.answer.done():
                    entry.answer.set_exception(error)
            return
        self._seconds_per_item += 0.2 * ((time.monotonic() - began) / len(batch) - self._seconds_per_item)
        for entry, answer in zip(batch, answers, strict=True):
            if not entry.answer.done():
                entry.answer.set_result(answer)


def _report(ended: asyncio.Task[None], on_failure: Callable[[BaseException], None]) -> None:
    error = None if ended.cancelled() else ended.exception()
    if error is not None:
        on_failure(error)
