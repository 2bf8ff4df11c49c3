"""The thread in which the engine steps; everything else asks it to do things between two steps."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from rlhf.errors import Unavailable
from rlhf.policy.engine import Engine, Event

P = ParamSpec("P")
T = TypeVar("T")

_Job = Callable[[], None]


class EngineThread:
    """Steps while there is something to do and sleeps otherwise. Belongs to the event loop that made it."""

    def __init__(
        self, engine: Engine, on_events: Callable[[list[Event]], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        """
        Args:
            on_events: gets the events of a step, on the event loop.
            on_failure: gets what a step raised, on the event loop; the thread has ended then.
        """
        self._engine = engine
        self._on_events = on_events
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        # A daemon: a process that has drained does not wait for sequences that nobody waits for.
        self._thread = threading.Thread(target=self._run, name="policy-engine", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, called in the engine's thread between two steps.

        Raises:
            Unavailable: the engine has stopped.
            Whatever the function raised.
        """
        return await asyncio.wrap_future(self.post(function, *args, **kwargs))

    def post(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The same without waiting; what is posted from one thread runs in that order."""
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:  # it is the caller's, and the engine goes on
                    future.set_exception(error)

        if self._closed:
            future.set_exception(Unavailable("the policy is stopping"))
        else:
            self._jobs.put(job)
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Stops after the step under way; sequences that are left are dropped."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._do_jobs():
                if events := self._engine.step():
                    self._loop.call_soon_threadsafe(self._on_events, events)
        except BaseException as error:
            self._closed = True
            self._loop.call_soon_threadsafe(self._on_failure, error)

    def _do_jobs(self) -> bool:
        """What was asked for meanwhile; waits for it while the engine has nothing to do. False: stop."""
        while True:
            load = self._engine.load
            busy = load.running + load.waiting > 0
            try:
                job = self._jobs.get(block=not busy)
            except queue.Empty:
                return True
            if job is None:
                return False
            job()
