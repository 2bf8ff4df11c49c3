"""Trying again what may work later, with growing pauses."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rlhf.errors import Overloaded, RlhfError, WeightsMismatch

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0


async def patiently(action: Callable[[], Awaitable[T]], *, timeout_s: float, what: str) -> T:
    """The action's result, however often it takes.

    Args:
        timeout_s: how long it may keep failing, counted from the first failure.
        what: what is tried, for the log.

    Raises:
        RlhfError: one that trying again cannot help, at once; the last one, after `timeout_s`.
    """
    first_failure_s: float | None = None
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await action()
        except RlhfError as error:
            now_s = time.monotonic()
            first_failure_s = now_s if first_failure_s is None else first_failure_s
            if not may_pass(error) or now_s - first_failure_s >= timeout_s:
                raise
            wait_s = max(pause_s, error.retry_after_s if isinstance(error, Overloaded) else 0.0)
            log.debug("%s: %s; again in %.1f s", what, error, wait_s)
        # Spread, so that workers that failed together do not come back together.
        await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def may_pass(error: RlhfError) -> bool:
    """Whether the same call may succeed later. A policy with older weights than asked for is about to get them."""
    return error.retryable or isinstance(error, WeightsMismatch)
