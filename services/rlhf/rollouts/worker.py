"""The rollout worker: `rlhf rollouts`. Prompts in, scored rollouts out; nothing is kept here.

    prompts stream                                                                     rollouts stream
         │ consume          ┌──── a group of up to `prompts_per_call` prompts ────────┐      ▲
         └─────────────────▶│ generate ─▶ ┌ score ┐ ─▶ assemble ─▶ enqueue ───────────┼──────┘
         ▲                  │     │       └ refer ┘                   │              │
         └── acknowledge ◀──│     ▼           ▼                       ▼              │
                            │  policy   reward, reference    waits while it is full  │
                            └────────────────────────────────────────────────────────┘

Many groups are under way at once, with up to `prompts_in_flight` prompts. A group is what was in the stream together
and may share a call; no prompt waits for others to come.

Who blocks whom: a service that is full answers RESOURCE_EXHAUSTED with a time to come back, one that is away
UNAVAILABLE, a policy with older weights than the prompt asks for FAILED_PRECONDITION; the group waits in the worker,
and the worker takes no other prompts in its place. A full rollouts stream makes every prompt in hand wait, and so the
prompts stream fill up, and so the trainer's prompt source wait.

Any other error may be due to one prompt alone: a group that meets it is taken apart, and each of its prompts tried by
itself. What fails by itself is counted, and a dead letter after three times.

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
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from rlhf.errors import Overloaded, RequestError, RlhfError
from rlhf.queues.connection import connect
from rlhf.queues.registry import Registry, open_registry
from rlhf.queues.streams import Delivery, Enqueued, Failed, Queue, prompts_queue, rollouts_queue
from rlhf.rollouts.assemble import assemble
from rlhf.rollouts.groups import Group, InHand, UnreadableTask, grouped, read_task
from rlhf.rollouts.patience import may_pass, patiently
from rlhf.rollouts.services import Services
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.settings.run import Settings
from rlhf.wire.messages import to_rollout

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
    async with Services.connected(settings.rollouts, settings.shaping) as services:
        worker = Worker(settings, services, prompts, rollouts, registry)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.stopped.set)
        await worker.work()


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
        self._groups: set[Group] = set()
        self._tasks = asyncio.TaskGroup()

    async def roll_out(self, group: Group) -> None:
        """A group of prompts, from the prompts stream to the rollouts stream."""
        tasks = [prompt.task for prompt in group.prompts]
        try:
            group.stage = "generating"
            generated = await self._patiently("generate", lambda: self._services.generate(tasks))
            group.stage = "scoring"
            scores, references = await both(
                self._patiently("score", lambda: self._services.score(tasks, generated)),
                self._patiently("refer", lambda: self._services.refer(tasks, generated)),
            )
            parts = zip(tasks, generated, scores, references, strict=True)
            rollouts = [assemble(*part, self._settings.consumer) for part in parts]
        except Exception as error:
            await self._fail(group, error, together=len(tasks) > 1)
            return
        group.stage = "handing over"
        await self._hand_over(group, {one.rollout_id: to_rollout(one).SerializeToString() for one in rollouts})

    async def work(self) -> None:
        """
        Raises:
            RlhfError: Redis stayed away, or the rollouts stream stayed full. What was in hand stays pending.
        """
        log.info("%s takes prompts, %d at once", self._settings.consumer, self._settings.prompts_in_flight)
        try:
            async with self._tasks:
                beside = [self._tasks.create_task(self._renew()), self._tasks.create_task(self._beat())]
                await self._take_prompts()
                await self._finish()
                for task in beside:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _take_prompts(self) -> None:
        while not self.stopped.is_set():
            room = self._settings.prompts_in_flight - self._in_hand()
            if room == 0:
                await asyncio.wait(self._works(), timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                continue
            found = await asyncio.to_thread(
                self._prompts.consume, self._settings.consumer, room, CONSUME_BLOCK_S, self.stopped
            )
            for group in grouped(await self._readable(found), self._settings.prompts_per_call):
                self._begin(group)

    async def _readable(self, deliveries: Sequence[Delivery]) -> list[InHand]:
        readable = []
        for delivery in deliveries:
            try:
                readable.append(InHand(delivery, read_task(delivery)))
            except UnreadableTask as error:
                await self._give_back(delivery, error)
        return readable

    def _begin(self, group: Group) -> None:
        self._groups.add(group)
        group.work = self._tasks.create_task(self.roll_out(group))
        group.work.add_done_callback(lambda _: self._groups.discard(group))

    async def _finish(self) -> None:
        if not self._groups:
            return
        log.info("%d prompts in hand have %g s to finish", self._in_hand(), self._settings.grace_s)
        deadline_s = time.monotonic() + self._settings.grace_s
        # Again and again, because a group that is taken apart begins others.
        while self._groups and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.wait(self._works(), timeout=left_s)
        for work in self._works():
            work.cancel()
        if left := self._in_hand():
            log.info("%d prompts stay pending for the next start of %s", left, self._settings.consumer)

    async def _hand_over(self, group: Group, payloads: Mapping[str, bytes]) -> None:
        """
        Args:
            payloads: rollouts by their id.
        """
        began_s, pause_s = time.monotonic(), 0.05
        while True:
            try:
                queued = await asyncio.to_thread(self._enqueue, tuple(group.prompts), payloads)
            except RequestError as error:
                await self._fail(group, error, together=len(group.prompts) > 1)
                return
            self.counts.update("rollouts" if outcome is Enqueued.ADDED else "duplicates" for outcome in queued.values())
            await asyncio.to_thread(self._prompts.acknowledge, [prompt.delivery for prompt in queued])
            for prompt in queued:
                group.let_go(prompt)
            if not group.prompts:
                return
            self._check_full(began_s)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, LONGEST_FULL_PAUSE_S)

    def _enqueue(self, prompts: Sequence[InHand], payloads: Mapping[str, bytes]) -> dict[InHand, Enqueued]:
        """In a thread, for all in one go: up to the first rollout that finds the stream full.

        Raises:
            RequestError: a rollout can never be queued.
        """
        queued: dict[InHand, Enqueued] = {}
        for prompt in prompts:
            outcome = self._rollouts.enqueue(prompt.task.rollout_id, payloads[prompt.task.rollout_id])
            if outcome is Enqueued.FULL:
                break
            queued[prompt] = outcome
        return queued

    def _check_full(self, began_s: float) -> None:
        if time.monotonic() - began_s >= self._settings.full_timeout_s:
            raise Overloaded(
                f"the rollouts stream has been full for {self._settings.full_timeout_s:g} s; see that the trainer "
                "runs, or raise rollouts.full_timeout_s"
            )

    async def _fail(self, group: Group, error: Exception, *, together: bool) -> None:
        """
        Args:
            together: the error was met by several prompts, of which perhaps one is to blame.
        """
        if together and not (isinstance(error, RlhfError) and may_pass(error)):
            log.info("%d prompts are tried one by one, after: %s", len(group.prompts), error)
            for alone in group.apart():
                self._begin(alone)
            return
        for prompt in tuple(group.prompts):
            await self._give_back(prompt.delivery, error)
            group.let_go(prompt)

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
            held = [(group, prompt) for group in self._groups for prompt in group.prompts]
            kept = await asyncio.to_thread(self._prompts.renew, [prompt.delivery for _, prompt in held])
            still_ours = {delivery.entry_id for delivery in kept}
            for group, prompt in held:
                if prompt.delivery.entry_id not in still_ours:
                    group.lose(prompt)

    async def _beat(self) -> None:
        """Tells Redis what this worker does, for `rlhf status`."""
        while True:
            stages = Counter(group.stage for group in self._groups for _ in group.prompts)
            fields = {"in_hand": stages.total(), "stages": dict(stages), **self.counts}
            await asyncio.to_thread(self._registry.beat, "rollouts", self._settings.consumer, fields)
            await asyncio.sleep(min(1.0, self._redis.lease_s / 3))

    def _in_hand(self) -> int:
        """Prompts."""
        return sum(len(group.prompts) for group in self._groups)

    def _works(self) -> list[asyncio.Task[None]]:
        return [group.work for group in self._groups if group.work is not None]


async def both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Two at once; when one fails the other is cancelled and the failure raised as it is."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
