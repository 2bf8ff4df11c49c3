"""Seeds side by side: each in a process of one thread, two at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

from harness.bench import Options, say

T = TypeVar("T")

PROCESSES = 2
THREADS = {f"each of {PROCESSES} processes": 1}


def by_seed(one: Callable[[int], T], seeds: int, options: Options) -> list[T]:
    """What `one` finds of each seed, in their order; where the script is only tried, in this process.

    Args:
        one: what is done for a seed; it can be pickled, and prints nothing.
    """
    found = []
    for number, result in enumerate(map(one, range(seeds)) if options.quick else _side_by_side(one, seeds), start=1):
        say(f"  seed {number}/{seeds}")
        found.append(result)
    return found


def _side_by_side(one: Callable[[int], T], seeds: int) -> Iterator[T]:
    # New processes and not forks of this one, whose torch may have threads.
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(one, range(seeds))
