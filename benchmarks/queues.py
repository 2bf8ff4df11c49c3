"""How many entries a second go through a queue, and what does Redis hold?

The product's queue over the embedded server with its append-only file, as runs use it: ids are checked for duplicates,
and entries and bytes are bounded. One producer and one consumer, processes of their own:

- enqueue: the stream fills to its bound; nobody reads.
- refuse: further ids, all refused because it is full.
- repeat: the same ids again, all refused as duplicates; what a producer that died does.
- consume: read and acknowledged, 64 at a time.
- both: at once.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from harness.bench import Figure, Measured, Options, interleaved, main, say, scratch
from harness.machine import cpu_s, peak_rss_mib
from rlhf.queues.connection import open_client
from rlhf.queues.keys import RunKeys
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Enqueued, Queue
from rlhf.supervisor.embedded_redis import EmbeddedRedis

SIZES_KIB = (4, 64)
AT_ONCE = 64
DEADLINE_S = 120.0


def measure(options: Options) -> Measured:
    count, repeats = options.size(2000, 20), options.size(3, 2)
    figures: list[Figure] = []
    for size_kib in SIZES_KIB:
        figures += _one_size(size_kib * 1024, count, repeats)
    setup = {
        "entries": count,
        "consumed_at_once": AT_ONCE,
        "bound_entries": count,
        "bound_mib": RedisSettings().max_mib,
        "appendfsync": "everysec",
    }
    return Measured(figures, setup, {"producer": 1, "consumer": 1, "redis-server": 1}, {"entries": count})


def _one_size(size_bytes: int, count: int, repeats: int) -> list[Figure]:
    """A server of its own for each size, so that its peak memory is this size's."""
    with scratch() as folder, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        redis = EmbeddedRedis(folder)
        url = redis.start()
        pid = redis.pid
        assert pid is not None
        try:
            runs = iter(f"run-{number}" for number in range(100))
            for warm in (pool.submit(_warm, url), pool.submit(_warm, url)):
                warm.result(DEADLINE_S)

            def each_alone() -> dict[str, float]:
                run = next(runs)
                ways = {"enqueue": produce, "refuse": meet_full, "repeat": meet_duplicates, "consume": consume}
                return {
                    name: pool.submit(way, url, run, size_bytes, count).result(DEADLINE_S) for name, way in ways.items()
                }

            def both_at_once() -> dict[str, float]:
                run, began_s, busy_s = next(runs), time.perf_counter(), cpu_s(pid)
                for work in [pool.submit(way, url, run, size_bytes, count) for way in (produce, consume)]:
                    work.result(DEADLINE_S)
                return {"both": time.perf_counter() - began_s, "redis": cpu_s(pid) - busy_s}

            say(f"  {size_bytes // 1024} KiB")
            found = interleaved({"alone": each_alone, "both": both_at_once}, repeats)
            peak_mib = peak_rss_mib(pid)
        finally:
            redis.stop()
    return _figures(size_bytes, count, found["alone"], found["both"], peak_mib)


def produce(url: str, run: str, size_bytes: int, count: int) -> float:
    return _enqueue(url, run, "new", size_bytes, count, Enqueued.ADDED)


def meet_full(url: str, run: str, size_bytes: int, count: int) -> float:
    return _enqueue(url, run, "too-many", size_bytes, count, Enqueued.FULL)


def meet_duplicates(url: str, run: str, size_bytes: int, count: int) -> float:
    return _enqueue(url, run, "new", size_bytes, count, Enqueued.DUPLICATE)


def consume(url: str, run: str, size_bytes: int, count: int) -> float:
    """Seconds until all are read and acknowledged."""
    queue, left = _queue(url, run, count), count
    began_s = time.perf_counter()
    while left:
        deliveries = queue.consume("bench", AT_ONCE, block_s=10.0)
        assert deliveries, "entries are missing"
        assert all(len(delivery.payload) == size_bytes for delivery in deliveries)
        left -= queue.acknowledge(deliveries)
    seconds = time.perf_counter() - began_s
    counts = queue.counts()
    assert (counts.added, counts.acknowledged, counts.dead, counts.lost) == (count, count, 0, 0)
    return seconds


def _enqueue(url: str, run: str, ids: str, size_bytes: int, count: int, expected: Enqueued) -> float:
    """Seconds for as many entries as the stream may hold."""
    queue, payload = _queue(url, run, count), b"x" * size_bytes
    began_s = time.perf_counter()
    answers = [queue.enqueue(f"{ids}/{number}", payload) for number in range(count)]
    seconds = time.perf_counter() - began_s
    assert set(answers) == {expected}
    return seconds


def _queue(url: str, run: str, max_entries: int) -> Queue:
    settings = RedisSettings(url=url, max_entries=max_entries)
    return Queue(open_client(url, settings), RunKeys(run).rollouts, "trainer", settings)


def _warm(url: str) -> None:
    """Starts a worker process, and keeps it busy until the other one has started too."""
    _queue(url, "warm", 1).depth()
    time.sleep(0.5)


def _figures(
    size_bytes: int, count: int, alone: list[dict[str, float]], both: list[dict[str, float]], peak_mib: float
) -> list[Figure]:
    at = f"{size_bytes // 1024} KiB"
    rates = {name: [count / run[name] for run in alone] for name in alone[0]}
    together = [count / run["both"] for run in both]
    return [
        Figure(f"{at}: enqueue", "entries/s", rates["enqueue"]),
        Figure(f"{at}: refused, stream full", "entries/s", rates["refuse"]),
        Figure(f"{at}: refused, duplicate", "entries/s", rates["repeat"]),
        Figure(f"{at}: consume and acknowledge", "entries/s", rates["consume"]),
        Figure(f"{at}: both at once", "entries/s", together, headline=True),
        Figure(f"{at}: both at once, payload", "MiB/s", [rate * size_bytes / 2**20 for rate in together]),
        Figure(f"{at}: Redis' CPU per entry, both at once", "µs", [1e6 * run["redis"] / count for run in both]),
        Figure(f"{at}: Redis' peak memory", "MiB", [peak_mib]),
    ]


if __name__ == "__main__":
    main("queues", "How many entries a second go through a queue, and what does Redis hold?", measure)
