"""Dynamic batching over a worker thread, with a forward that records its batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from rlhf.errors import Overloaded, RequestError, RlhfError, RuleError, Unavailable
from rlhf.serving.batcher import Batcher, Limits
from rlhf.serving.worker_thread import WorkerThread

Forward = Callable[[Sequence[int]], Sequence[int]]


class Recorder:
    """Doubles each item, once `gate` is open; an item is its own length."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(items))
        self.gate.wait(10)
        return [2 * item for item in items]


@asynccontextmanager
async def batching(
    forward: Forward, *, size: int = 4, tokens: int = 100, waiting: int = 50, delay_s: float = 0.02
) -> AsyncIterator[Batcher[int, int]]:
    worker = WorkerThread("test")
    failures: list[BaseException] = []
    batcher: Batcher[int, int] = Batcher(worker, forward, Limits(size, tokens, waiting, delay_s), length=lambda n: n)
    async with batcher.running(failures.append):
        yield batcher
    worker.close()
    assert failures == []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition lies in another thread
            await asyncio.sleep(0.005)


def test_calls_share_a_batch_and_get_their_own_answers() -> None:
    async def scenario() -> None:
        forward = Recorder()
        async with batching(forward) as batcher:
            answers = await asyncio.gather(batcher.submit([1, 2]), batcher.submit([3]), batcher.submit([4]))
        assert answers == [[2, 4], [6], [8]]
        assert forward.batches == [[1, 2, 3, 4]]

    asyncio.run(scenario())


def test_batches_are_bounded_by_items_and_by_padded_tokens() -> None:
    async def scenario() -> None:
        forward = Recorder()
        async with batching(forward, size=3, tokens=20) as batcher:
            assert await asyncio.gather(batcher.submit([5, 5, 5]), batcher.submit([5, 10, 11])) == [
                [10, 10, 10],
                [10, 20, 22],
            ]
        assert forward.batches == [[5, 5, 5], [5, 10], [11]]

    asyncio.run(scenario())


def test_what_a_forward_cannot_take_is_refused() -> None:
    async def scenario() -> None:
        async with batching(Recorder(), size=2, tokens=20) as batcher:
            with pytest.raises(RequestError, match="3 items in one call and max_batch_size is 2"):
                await batcher.submit([1, 1, 1])
            with pytest.raises(RequestError, match="an item of 21 tokens, and max_batch_tokens is 20"):
                await batcher.submit([21])

    asyncio.run(scenario())


def test_more_than_may_wait_is_refused_with_a_time_to_try_again() -> None:
    async def scenario() -> None:
        forward = Recorder()
        forward.gate.clear()
        async with batching(forward, size=2, waiting=3, delay_s=0) as batcher:
            first = asyncio.create_task(batcher.submit([1, 1]))
            await until(lambda: len(forward.batches) == 1)
            second = asyncio.create_task(batcher.submit([2, 2]))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as refused:
                await batcher.submit([3, 3])
            assert refused.value.retry_after_s > 0
            third = asyncio.create_task(batcher.submit([3]))
            forward.gate.set()
            assert await asyncio.gather(first, second, third) == [[2, 2], [4, 4], [6]]

    asyncio.run(scenario())


def test_cancelled_items_leave_before_the_forward() -> None:
    async def scenario() -> None:
        forward = Recorder()
        forward.gate.clear()
        async with batching(forward, delay_s=0) as batcher:
            first = asyncio.create_task(batcher.submit([1]))
            await until(lambda: len(forward.batches) == 1)
            cancelled = asyncio.create_task(batcher.submit([2, 3]))
            kept = asyncio.create_task(batcher.submit([4]))
            await asyncio.sleep(0.01)
            cancelled.cancel()
            await asyncio.sleep(0.01)
            forward.gate.set()
            assert await first == [2]
            assert await kept == [8]
        assert forward.batches == [[1], [4]]

    asyncio.run(scenario())


def test_a_failing_forward_fails_its_calls_and_no_others() -> None:
    async def scenario() -> None:
        def forward(items: Sequence[int]) -> Sequence[int]:
            if 13 in items:
                raise RuleError("thirteen")
            return list(items)

        async with batching(forward, size=2) as batcher:
            ok, bad = await asyncio.gather(batcher.submit([1, 2]), batcher.submit([13, 1]), return_exceptions=True)
            assert ok == [1, 2]
            assert isinstance(bad, RuleError)
            assert await batcher.submit([7]) == [7]

    asyncio.run(scenario())


def test_a_wrong_number_of_answers_is_an_error() -> None:
    async def scenario() -> None:
        async with batching(lambda items: [1]) as batcher:
            with pytest.raises(RlhfError, match="1 answers to a batch of 2 items"):
                await batcher.submit([1, 2])

    asyncio.run(scenario())


def test_one_thread_runs_everything_in_order_and_skips_the_cancelled() -> None:
    async def scenario() -> None:
        worker, gate, seen = WorkerThread("test"), threading.Event(), []

        def note(number: int) -> int:
            seen.append((number, threading.current_thread().name))
            gate.wait(10)
            return number

        calls = [asyncio.create_task(worker.run(note, number)) for number in range(3)]
        await until(lambda: len(seen) == 1)
        calls[1].cancel()
        await asyncio.sleep(0.01)
        gate.set()
        assert [await calls[0], await calls[2]] == [0, 2]
        assert seen == [(0, "test-worker"), (2, "test-worker")]
        worker.close()
        with pytest.raises(Unavailable):
            await worker.run(note, 4)

    asyncio.run(scenario())
