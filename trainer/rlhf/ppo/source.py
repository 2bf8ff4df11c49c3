"""The prompt source: a thread of the trainer that issues prompts as fast as admission allows.

It waits on the ledger (no room: the trainer is behind) and on the prompts stream (full: the workers are behind).
Prompts come in an endless sequence, each pass over the data in an order of its own; a prompt's index in that sequence
and the run's seed decide everything about it, so that a restarted trainer issues the very same tasks.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from rlhf.ppo.ledger import Issue, Ledger
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.queues.streams import Enqueued
from rlhf.wire.messages import to_prompt_task
from rlhf.wire.records import PromptTask, Sampling, Stopping, WeightVersion

FULL_WAIT_S = 0.2


class PromptsStream(Protocol):
    """The side of `rlhf.queues.streams.Queue` that a producer sees."""

    def enqueue(self, item_id: str, payload: bytes) -> Enqueued: ...


class TaskMaker:
    """Turns an issue into the task that travels."""

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        run_id: str,
        seed: int,
        sampling: Sampling,
        stopping: Stopping,
        tokenizer_sha256: str,
        ref_hidden_states: bool = False,
        seed_of_attempt: bool = True,
    ) -> None:
        """
        Args:
            seed_of_attempt: a prompt that is issued again is sampled with another seed. False: with the same, so that
                what a restart sends again comes out as it did (`run.deterministic`).
        """
        self.prompts = prompts
        self.run_id = run_id
        self.seed = seed
        self.sampling = sampling
        self.stopping = stopping
        self.tokenizer_sha256 = tokenizer_sha256
        self.ref_hidden_states = ref_hidden_states
        self.seed_of_attempt = seed_of_attempt
        self._order = lru_cache(maxsize=2)(self._permutation)

    def task(self, issue: Issue, rollout_id: str, at_least: WeightVersion) -> PromptTask:
        passes, position = divmod(issue.prompt_index, len(self.prompts))
        prompt = self.prompts[self._order(passes)[position]]
        return PromptTask(
            rollout_id=rollout_id,
            run_id=self.run_id,
            prompt_index=issue.prompt_index,
            attempt=issue.attempt,
            token_ids=prompt.token_ids,
            text=prompt.text,
            metadata=prompt.metadata,
            sampling=replace(self.sampling, seed=self._sampling_seed(issue)),
            stopping=self.stopping,
            at_least=at_least,
            tokenizer_sha256=self.tokenizer_sha256,
            ref_hidden_states=self.ref_hidden_states,
        )

    def _permutation(self, passes: int) -> list[int]:
        order: list[int] = np.random.default_rng((self.seed, passes)).permutation(len(self.prompts)).tolist()
        return order

    def _sampling_seed(self, issue: Issue) -> int:
        key = f"{self.seed}/{issue.prompt_index}/{issue.attempt if self.seed_of_attempt else 0}".encode()
        # 48 bits: room for the + k of the k-th completion in every language's integers.
        return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little")


class PromptSource(threading.Thread):
    """
    Args:
        version: answers the newest published weights; the policy that answers a prompt must not be older.
    """

    def __init__(
        self, ledger: Ledger, queue: PromptsStream, maker: TaskMaker, version: Callable[[], WeightVersion]
    ) -> None:
        super().__init__(name="prompt-source", daemon=True)
        self.ledger = ledger
        self.queue = queue
        self.maker = maker
        self.version = version
        self.error: BaseException | None = None
        """What ended the thread, for the trainer's main thread to raise."""
        self._stopped = threading.Event()

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                issue = self.ledger.next_issue()
                if issue is None:
                    with self.ledger.changed:
                        self.ledger.changed.wait(timeout=0.5)
                else:
                    self._send(issue)
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self._stopped.set()
        with self.ledger.changed:
            self.ledger.changed.notify_all()

    def _send(self, issue: Issue) -> None:
        rollout_id = self.ledger.rollout_id(issue)
        payload = to_prompt_task(self.maker.task(issue, rollout_id, self.version())).SerializeToString()
        while self.queue.enqueue(rollout_id, payload) is Enqueued.FULL:
            if self._stopped.wait(FULL_WAIT_S):
                return
