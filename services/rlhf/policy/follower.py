"""Membership in a run: the replica registers itself, and follows the run's current weights.

The pointer in Redis is the truth: what a publish did not bring is fetched from where the pointer says, as soon as it
moves, and a rollback by hand lasts until the next look. The replica is ready while it holds what is current, or has
lagged behind for less than the grace; a new one is ready once it has caught up. Where nothing is published yet, the
start model will do. While Redis is away the replica goes on serving as it is.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from rlhf.errors import RlhfError, TransientError
from rlhf.policy.engine import Engine
from rlhf.policy.settings import PolicySettings
from rlhf.policy.weights import WeightChanges, folder_of
from rlhf.queues.registry import Current, Registry, Replica
from rlhf.wire.records import WeightVersion

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

REDIS_TIMEOUT_S = 2.0
"""For one look at Redis; the next one comes soon."""


class Follower:
    """One replica in its run. `registry` should give up within REDIS_TIMEOUT_S."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        changes: WeightChanges,
        settings: PolicySettings,
        address: str,
        set_ready: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._changes = changes
        self._settings = settings
        self._address = address
        self._set_ready = set_ready
        self._ready = False
        self._behind_since_s: float | None = None
        self._caught_up = False
        self._redis_away = False
        self._leaving = threading.Event()

    async def follow(self) -> None:
        """Until cancelled."""
        current: Current | None = None
        waits_s = 0.0
        while True:
            try:
                current = await self._in_thread(self._registry.wait_for_change, waits_s, current, self._leaving)
            except TransientError as error:
                self._note_redis(error)
                await asyncio.sleep(self._settings.weights_poll_s)
                continue
            waits_s = self._settings.weights_poll_s
            if current is not None and current.version != self._engine.versions.current:
                await self._catch_up(current)
            await self._judge(None if current is None else current.version)

    async def stay_registered(self, lease_s: float) -> None:
        """Until cancelled: renews the registration well within its lease, also while weights are loading."""
        while True:
            await self.register()
            await asyncio.sleep(min(self._settings.weights_poll_s, lease_s / 3))

    async def register(self) -> None:
        versions, load = self._engine.versions, self._engine.load
        replica = Replica(self._settings.name, self._address, versions.current, versions.prepared, self._ready)
        fields = {
            "address": self._address,
            "version": str(versions.current),
            "ready": self._ready,
            "running": load.running,
            "waiting": load.waiting,
        }
        try:
            await self._in_thread(self._registry.register, replica)
            await self._in_thread(self._registry.beat, "policy", self._settings.name, fields)
        except TransientError as error:
            self._note_redis(error)
        else:
            self._note_redis(None)

    async def unregister(self) -> None:
        """On the way out; the lease ends it too."""
        self._ready = False
        try:
            await asyncio.to_thread(self._registry.unregister, self._settings.name)
        except TransientError as error:
            self._note_redis(error)

    async def _catch_up(self, current: Current) -> None:
        try:
            await self._changes.prepare(folder_of(current.uri), current.version)
            await self._changes.commit(current.version, None)
        except RlhfError as error:
            log.warning("weights %s could not be fetched, the next look tries again: %s", current.version, error)

    async def _judge(self, wanted: WeightVersion | None) -> None:
        """Sets readiness by how long the replica has lagged behind."""
        now = time.monotonic()
        if wanted is None or wanted == self._engine.versions.current:
            self._behind_since_s, self._caught_up = None, True
        else:
            self._behind_since_s = self._behind_since_s or now
        behind_s = 0.0 if self._behind_since_s is None else now - self._behind_since_s
        ready = self._caught_up and behind_s <= self._settings.weights_grace_s
        if ready != self._ready:
            self._ready = ready
            log.info("ready" if ready else f"not ready: weights {wanted} are missed for {behind_s:.0f} s")
            await self._set_ready(ready)
            await self.register()

    async def _in_thread(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As `asyncio.to_thread`, but who cancels it gets on when the thread is done: next come the end of the
        registration, which must not be written once more, and of the connection."""
        thread = asyncio.create_task(asyncio.to_thread(function, *args, **kwargs))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._leaving.set()
            await asyncio.wait([thread])
            raise

    def _note_redis(self, error: TransientError | None) -> None:
        if error is not None and not self._redis_away:
            log.warning("Redis is away; serving goes on with weights %s: %s", self._engine.versions.current, error)
        elif error is None and self._redis_away:
            log.info("Redis is back")
        self._redis_away = error is not None
