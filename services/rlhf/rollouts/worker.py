"""The rollout worker: `rlhf rollouts`. Prompts in, scored rollouts out; nothing is kept here.

    prompts stream                                                                     rollouts stream
         │ consume          ┌──────────── one of up to `prompts_in_flight` ───────────┐      ▲
         └─────────────────▶│ generate ─▶ ┌ score ┐ ─▶ assemble ─▶ enqueue ───────────┼──────┘
         ▲                  │     │       └ refer ┘                   │              │
         └── acknowledge ◀──│     ▼           ▼                       ▼              │
                            │  policy   reward, reference    waits while it is full  │
                            └────────────────────────────────────────────────────────┘

Who blocks whom: a service that is full answers RESOURCE_EXHAUSTED with a time to come back, one that is away
UNAVAILABLE, a policy with older weights than the prompt asks for FAILED_PRECONDITION; the prompt waits in the worker,
and the worker takes no other in its place. A full rollouts stream makes every prompt in hand wait, and so the prompts
stream fill up, and so the trainer's prompt source wait.

A prompt is acknowledged once its rollout is in the rollouts stream, whose ids are unique: killed in between, the worker
does the work again and the stream takes it once. Prompts in hand are renewed, so that no other worker takes them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from rlhf.errors import Overloaded, RequestError, RlhfError
from rlhf.queues.connection import connect
from rlhf.queues.registry import Registry, open_registry
from rlhf.queues.streams import Delivery, Enqueued, Failed, Queue, prompts_queue, rollouts_queue
from rlhf.rollouts.assemble import assemble
from rlhf.rollouts.patience import patiently
from rlhf.rollouts.services import Services
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.settings.run import Settings
from rlhf.v1 import rollout_pb2
from rlhf.wire.messages import from_prompt_task, to_rollout
from rlhf.wire.records import PromptTask, Rollout

log = logging.getLogger(__name__)

CONSUME_BLOCK_S = 1.0
LONGEST_FULL_PAUSE_S = 1.0

T = TypeVar("T")
U = TypeVar("U")


def run(settings: Settings) -> None:
    """Works until SIGTERM or SIGINT.

    Raises:
        Unavailable: Redis stayed away.
        Overloaded: the rollouts stream stayed full.
    """
    client = connect(settings)
    prompts = prompts_queue(client, settings.run.name, settings.redis)
    rollouts = rollouts_queue(client, settings.run.name, settings.redis)
    registry = open_registry(client, settings.run.name, settings.redis)
    asyncio.run(_until_signalled(settings, prompts, rollouts, registry))


async def _until_signalled(settings: Settings, prompts: Queue, rollouts: Queue, registry: Registry) -> None:
    async with Services.connected(settings.rollouts) as services:
        worker = Worker(settings, services, prompts, rollouts, registry)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.stopped.set)
        await worker.work()


@dataclass(eq=False)
class _InHand:
    """A prompt that is being worked on."""

    delivery: Delivery
    stage: str = "waiting"
    work: asyncio.Task[None] | None = None


class Worker:
    """Belongs to one event loop. Setting `stopped`, from any thread, ends `work` within `grace_s`."""

    def __init__(
        self, settings: Settings, services: Services, prompts: Queue, rollouts: Queue, registry: Registry
    ) -> None:
        self.stopped = threading.Event()
        self.counts: Counter[str] = Counter()
        """Of this process: rollouts, duplicates, failures, dead."""
        self._settings: RolloutsSettings = settings.rollouts
        self._redis = settings.redis
        self._services = services
        self._prompts = prompts
        self._rollouts = rollouts
        self._registry = registry
        self._in_hand: dict[str, _InHand] = {}

    async def roll_out(self, held: _InHand) -> None:
        """One prompt, from the prompts stream to the rollouts stream."""
        try:
            task = read_task(held.delivery)
            held.stage = "generating"
            generated = await self._patiently("generate", lambda: self._services.generate(task))
            completions = generated.completions
            held.stage = "scoring"
            scores, references = await both(
                self._patiently("score", lambda: self._services.score(task, completions)),
                self._patiently("refer", lambda: self._services.refer(task, completions)),
            )
            rollout = assemble(task, generated, scores, references, self._settings.consumer)
        except Exception as error:
            await self._give_back(held.delivery, error)
            return
        held.stage = "handing over"
        if await self._enqueue(held.delivery, rollout):
            await asyncio.to_thread(self._prompts.acknowledge, [held.delivery])

    async def work(self) -> None:
        """
        Raises:
            RlhfError: Redis stayed away, or the rollouts stream stayed full. What was in hand stays pending.
        """
        log.info("%s takes prompts, %d at once", self._settings.consumer, self._settings.prompts_in_flight)
        try:
            async with asyncio.TaskGroup() as group:
                beside = [group.create_task(self._renew()), group.create_task(self._beat())]
                await self._take_prompts(group)
                await self._finish()
                for task in beside:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _take_prompts(self, group: asyncio.TaskGroup) -> None:
        while not self.stopped.is_set():
            room = self._settings.prompts_in_flight - len(self._in_hand)
            if room == 0:
                await asyncio.wait(self._works(), timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                continue
            for delivery in await asyncio.to_thread(
                self._prompts.consume, self._settings.consumer, room, CONSUME_BLOCK_S, self.stopped
            ):
                held = _InHand(delivery)
                self._in_hand[delivery.entry_id] = held
                held.work = group.create_task(self.roll_out(held))
                held.work.add_done_callback(partial(self._let_go, held))

    async def _finish(self) -> None:
        if not self._in_hand:
            return
        log.info("%d prompts in hand have %g s to finish", len(self._in_hand), self._settings.grace_s)
        _, left = await asyncio.wait(self._works(), timeout=self._settings.grace_s)
        for work in left:
            work.cancel()
        if left:
            log.info("%d prompts stay pending for the next start of %s", len(left), self._settings.consumer)

    async def _enqueue(self, delivery: Delivery, rollout: Rollout) -> bool:
        """False: the rollout can never be queued, and the prompt was given back."""
        payload = to_rollout(rollout).SerializeToString()
        began_s, pause_s = time.monotonic(), 0.05
        while True:
            try:
                outcome = await asyncio.to_thread(self._rollouts.enqueue, rollout.rollout_id, payload)
            except RequestError as error:
                await self._give_back(delivery, error)
                return False
            if outcome is not Enqueued.FULL:
                self.counts["rollouts" if outcome is Enqueued.ADDED else "duplicates"] += 1
                return True
            self._check_full(began_s)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, LONGEST_FULL_PAUSE_S)

    def _check_full(self, began_s: float) -> None:
        if time.monotonic() - began_s >= self._settings.full_timeout_s:
            raise Overloaded(
                f"the rollouts stream has been full for {self._settings.full_timeout_s:g} s; see that the trainer "
                "runs, or raise rollouts.full_timeout_s"
            )

    async def _give_back(self, delivery: Delivery, error: Exception) -> None:
        """Counts a failure, or gives up at once what no second try can read."""
        if not isinstance(error, RlhfError):
            log.error("%s: a fault of the worker's own", delivery.item_id, exc_info=error)
        reason = str(error) if isinstance(error, RlhfError) else f"{type(error).__name__}: {error}"
        settle = self._prompts.dead_letter if isinstance(error, UnreadableTask) else self._prompts.fail
        outcome = await asyncio.to_thread(settle, delivery, reason)
        self.counts["dead" if outcome is Failed.DEAD else "failures"] += 1
        log.warning("%s failed (%s): %s", delivery.item_id, outcome.name, reason)

    async def _patiently(self, what: str, action: Callable[[], Awaitable[T]]) -> T:
        return await patiently(action, timeout_s=self._settings.unavailable_timeout_s, what=what)

    async def _renew(self) -> None:
        """Holds what is in hand, and drops what has become somebody else's."""
        while True:
            await asyncio.sleep(self._redis.reclaim_idle_s / 3)
            held = list(self._in_hand.values())
            kept = await asyncio.to_thread(self._prompts.renew, [one.delivery for one in held])
            still_ours = {delivery.entry_id for delivery in kept}
            for one in held:
                if one.delivery.entry_id not in still_ours and one.work is not None:
                    one.work.cancel()

    async def _beat(self) -> None:
        """Tells Redis what this worker does, for `rlhf status`."""
        while True:
            stages = Counter(one.stage for one in self._in_hand.values())
            fields = {"in_hand": len(self._in_hand), "stages": dict(stages), **self.counts}
            await asyncio.to_thread(self._registry.beat, "rollouts", self._settings.consumer, fields)
            await asyncio.sleep(min(1.0, self._redis.lease_s / 3))

    def _works(self) -> list[asyncio.Task[None]]:
        return [one.work for one in self._in_hand.values() if one.work is not None]

    def _let_go(self, held: _InHand, _: asyncio.Task[None]) -> None:
        # A prompt that failed may have been delivered again before this runs; that one stays.
        if self._in_hand.get(held.delivery.entry_id) is held:
            del self._in_hand[held.delivery.entry_id]


class UnreadableTask(RlhfError):
    """An entry of the prompts stream that holds no PromptTask, however often it is read."""


def read_task(delivery: Delivery) -> PromptTask:
    """
    Raises:
        UnreadableTask: the payload is no PromptTask, or one without prompt or completions.
    """
    try:
        task = from_prompt_task(rollout_pb2.PromptTask.FromString(delivery.payload))
    except (DecodeError, RequestError) as error:
        raise UnreadableTask(f"the entry holds no PromptTask: {error}") from error
    if len(task.token_ids) == 0 or task.sampling.completions == 0:
        raise UnreadableTask("the PromptTask has no prompt tokens, or asks for no completions")
    return task


async def both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Two at once; when one fails the other is cancelled and the failure raised as it is."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
