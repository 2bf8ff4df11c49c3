"""Producers and consumers on one queue while its server is killed again and again."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf.queues.streams import Enqueued, Queue
from rlhf.supervisor.embedded_redis import EmbeddedRedis


@dataclass
class Ledger:
    """What producers were told and consumers did."""

    confirmed: set[str] = field(default_factory=set)
    """Ids whose enqueue was answered."""
    effects: Counter[str] = field(default_factory=Counter)
    """Ids worked on, with how often: the ledger that a trainer keeps in its checkpoint."""
    acknowledged: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)
    kills: int = 0


def torture(server: EmbeddedRedis, make: Callable[[], Queue], *, kills: int, every_s: float, seed: int) -> Ledger:
    """Two producers enqueue the same ids, so that each id comes twice, and two consumers acknowledge them, while the
    server is killed with SIGKILL and started again; then all that was confirmed is consumed in peace."""
    ledger, chance = Ledger(), random.Random(seed)
    enough, done = threading.Event(), threading.Event()
    producers = [threading.Thread(target=_noting(ledger, _produce), args=(make(), ledger, enough)) for _ in range(2)]
    consumers = [
        threading.Thread(target=_noting(ledger, _consume), args=(make(), f"consumer-{i}", ledger, done))
        for i in range(2)
    ]
    for thread in producers + consumers:
        thread.start()
    try:
        for _ in range(kills):
            time.sleep(chance.uniform(0.5, 1.5) * every_s)
            _kill(server)
            ledger.kills += 1
            server.start()
        enough.set()
        _join(producers)
        deadline = time.monotonic() + 30
        while set(ledger.acknowledged) < ledger.confirmed and not ledger.errors and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        enough.set()
        done.set()
        _join(producers + consumers)
    return ledger


def _kill(server: EmbeddedRedis) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.alive():
        time.sleep(0.005)


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a wait without an end"


def _noting(ledger: Ledger, work: Callable[..., None]) -> Callable[..., None]:
    def noted(*args: object) -> None:
        try:
            work(*args)
        except BaseException as error:
            ledger.errors.append(error)

    return noted


def _produce(queue: Queue, ledger: Ledger, enough: threading.Event) -> None:
    for item in itertools.count():
        while queue.enqueue(str(item), b"x" * 500) is Enqueued.FULL:
            time.sleep(0.01)
        ledger.confirmed.add(str(item))
        if enough.is_set():
            return


def _consume(queue: Queue, name: str, ledger: Ledger, done: threading.Event) -> None:
    while not done.is_set():
        found = queue.consume(name, 7, 0.2, done)
        for delivery in found:
            if not delivery.redelivered or delivery.item_id not in ledger.effects:
                ledger.effects[delivery.item_id] += 1
        queue.acknowledge(found)
        ledger.acknowledged.update(delivery.item_id for delivery in found)
