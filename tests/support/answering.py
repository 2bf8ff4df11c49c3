"""A stand-in for worker and services: answers the prompts stream with random tokens, stamped as a policy would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import redis

from rlhf.queues.keys import RunKeys
from rlhf.queues.registry import Registry
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Enqueued, prompts_queue, rollouts_queue
from rlhf.v1 import rollout_pb2
from rlhf.wire.messages import from_prompt_task, to_rollout
from rlhf.wire.records import FinishReason, PromptTask, Rollout
from support.rollouts import rollout, scored


class AnsweringWorker(threading.Thread):
    """
    Args:
        fails: of a task, the reason to fail it with; None answers it.
    """

    def __init__(
        self, client: redis.Redis, run: str, settings: RedisSettings, fails: Callable[[PromptTask], str | None]
    ) -> None:
        super().__init__(daemon=True)
        self.prompts = prompts_queue(client, run, settings)
        self.rollouts = rollouts_queue(client, run, settings)
        self.registry = Registry(client, RunKeys(run), settings.lease_s)
        self.fails = fails
        self.stopped = threading.Event()
        self.random = np.random.default_rng(0)

    def run(self) -> None:
        while not self.stopped.is_set():
            for delivery in self.prompts.consume("worker-0", 8, 0.2, self.stopped):
                if not delivery.payload:
                    self.prompts.dead_letter(delivery, "no prompt")
                    continue
                task = from_prompt_task(rollout_pb2.PromptTask.FromString(delivery.payload))
                reason = self.fails(task)
                if reason is not None:
                    self.prompts.fail(delivery, reason)
                    continue
                self._enqueue(self._answer(task))
                self.prompts.acknowledge([delivery])

    def stop(self) -> None:
        self.stopped.set()
        self.join(timeout=10)

    def _answer(self, task: PromptTask) -> Rollout:
        current = self.registry.current()
        assert current is not None
        completions = [
            scored(
                [*task.token_ids.tolist(), *self.random.integers(3, 250, size=5).tolist()],
                len(task.token_ids),
                score=float(self.random.normal()),
                finish_reason=FinishReason.LENGTH,
                weights=current.version,
            )
            for _ in range(task.sampling.completions)
        ]
        made = rollout(task.prompt_index, *completions, attempt=task.attempt, run_id=task.run_id)
        return replace(made, rollout_id=task.rollout_id, created_unix_s=time.time())

    def _enqueue(self, made: Rollout) -> None:
        payload = to_rollout(made).SerializeToString()
        while self.rollouts.enqueue(made.rollout_id, payload) is Enqueued.FULL and not self.stopped.is_set():
            time.sleep(0.05)
