"""Prompts that a worker takes through the services together: read from the stream, and put into groups."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from google.protobuf.message import DecodeError

from rlhf.errors import RequestError, RlhfError
from rlhf.queues.streams import Delivery
from rlhf.v1 import rollout_pb2
from rlhf.wire.messages import from_prompt_task
from rlhf.wire.records import PromptTask

MAX_COMPLETIONS = 64
"""Of one group. Beyond it a call costs little beside what it carries, and the services refuse calls that are too large.
A prompt with more completions than this goes alone."""


class UnreadableTask(RlhfError):
    """An entry of the prompts stream that holds no PromptTask, however often it is read."""


@dataclass(eq=False, frozen=True)
class InHand:
    """A prompt that is being worked on."""

    delivery: Delivery
    task: PromptTask


@dataclass(eq=False)
class Group:
    """Prompts that share their calls. One leaves when it is done with, or has become somebody else's."""

    prompts: list[InHand]
    stage: str = "waiting"
    work: asyncio.Task[None] | None = None

    def let_go(self, prompt: InHand) -> None:
        if prompt in self.prompts:
            self.prompts.remove(prompt)

    def lose(self, prompt: InHand) -> None:
        """The others go on; work for nobody ends."""
        if self.prompts == [prompt] and self.work is not None:
            self.work.cancel()
        self.let_go(prompt)

    def apart(self) -> list[Group]:
        """Each prompt in a group of its own; this one is left empty."""
        prompts, self.prompts = self.prompts, []
        return [Group([prompt]) for prompt in prompts]


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


def grouped(prompts: Sequence[InHand], most: int) -> list[Group]:
    """Groups of at most `most` prompts that may share a call: as few as possible, and as equal in size."""
    alike: dict[Hashable, list[InHand]] = {}
    for prompt in prompts:
        alike.setdefault(_what_a_call_fixes(prompt.task), []).append(prompt)
    return [
        Group(part)
        for some in alike.values()
        for part in _evenly(some, max(1, min(most, MAX_COMPLETIONS // some[0].task.sampling.completions)))
    ]


def _what_a_call_fixes(task: PromptTask) -> Hashable:
    """A call has a seed for each prompt or for none; everything else in it holds for all."""
    sampling = replace(task.sampling, seed=None)
    drawn = task.sampling.seed is None
    return task.run_id, sampling, drawn, task.stopping, task.at_least, task.tokenizer_sha256, task.ref_hidden_states


def _evenly(prompts: list[InHand], most: int) -> list[list[InHand]]:
    count = -(-len(prompts) // most)
    bounds = [len(prompts) * part // count for part in range(count + 1)]
    return [prompts[start:end] for start, end in pairwise(bounds)]
