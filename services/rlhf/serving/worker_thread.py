"""The one thread in which torch runs, so that the event loop stays free to answer health checks and take calls."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from rlhf.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class WorkerThread:
    """Runs functions one after another, in the order they were given.

    The thread is a daemon: a process that is told to stop while a model loads does not wait for the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=f"{name}-worker", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result. If the caller is cancelled before its turn, the function is never called.

        Raises:
            Unavailable: the thread was closed.
            Whatever the function raised.
        """
        if self._closed:
            raise Unavailable(f"{self._name} is stopping")
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                _settle(future, lambda: function(*args, **kwargs))

        self._jobs.put(job)
        return await asyncio.wrap_future(future)

    def close(self, timeout_s: float = 5.0) -> None:
        """Takes no more work and waits for what is there."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # whatever it is, it is the caller's, and the thread goes on
        future.set_exception(error)
