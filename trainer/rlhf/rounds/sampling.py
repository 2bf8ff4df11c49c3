"""Completions of the newest policy and what the reward model in service thinks of them.

They come through the services that step 3 runs on, so that a round sees what PPO sees.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rlhf.data.prompts import Prompt, encode_prompt
from rlhf.data.samples import Sampled, SampledCompletion
from rlhf.data.sampling import sampling_of
from rlhf.errors import ModelError
from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.rollouts.groups import MAX_COMPLETIONS
from rlhf.rollouts.patience import patiently
from rlhf.rollouts.services import Generated, Scores, Services
from rlhf.settings.run import Settings
from rlhf.wire.records import Completion, LogprobMode, PromptTask, WeightVersion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

CALLS_AT_ONCE = 2
"""PPO's rollouts share the services; a round need not be fast."""


@dataclass(frozen=True)
class Asked:
    """What to sample."""

    name: str
    """Of the request, so that asking again after a restart meets the same answer: `<run>/rounds/<n>/audit`."""
    prompts: Sequence[Prompt]
    completions: int
    seed: int


class Sampler:
    """
    Args:
        tokenizer: the policy's.
    """

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._tokenizer_sha256 = tokenizer_sha256(tokenizer)

    def sample(self, asked: Asked, at_least: WeightVersion | None) -> list[Sampled]:
        """Of weights that are not older than `at_least`.

        Raises:
            RlhfError: the policy service refuses, or stays away for `rollouts.unavailable_timeout_s`.
        """
        tasks = [replace(task, at_least=at_least) for task in self._tasks(asked)]
        answers = self._through(tasks, lambda services, some: services.generate(some), "a round's completions")
        return [_sampled(task, answer) for task, answer in zip(tasks, answers, strict=True)]

    def score(self, asked: Asked, samples: Sequence[Sampled]) -> list[Scores]:
        """By the reward model in service; each prompt's completions by one.

        Args:
            samples: the answer to `asked`, now or earlier.
        """
        generated = [_as_generated(sampled) for sampled in samples]

        async def score(services: Services, some: Sequence[PromptTask]) -> list[Scores]:
            return await services.score(some, [generated[task.prompt_index] for task in some])

        return self._through(self._tasks(asked), score, "a round's scores")

    def _through(
        self,
        tasks: Sequence[PromptTask],
        ask: Callable[[Services, Sequence[PromptTask]], Awaitable[list[T]]],
        what: str,
    ) -> list[T]:
        """In calls of a few tasks, a few calls at a time; the answers are in the order of the tasks."""
        its = self._settings.rollouts

        async def all_of_them() -> list[T]:
            room = asyncio.Semaphore(CALLS_AT_ONCE)
            async with Services.connected(its, self._settings.shaping) as services:

                async def one(some: Sequence[PromptTask]) -> list[T]:
                    async with room:
                        call = lambda: ask(services, some)  # noqa: E731
                        return await patiently(call, timeout_s=its.unavailable_timeout_s, what=what)

                parts = await asyncio.gather(*(one(some) for some in _groups(tasks)))
            return [answer for part in parts for answer in part]

        return asyncio.run(all_of_them())

    def _tasks(self, asked: Asked) -> list[PromptTask]:
        sampling, stopping = sampling_of(self._settings.sampling, asked.completions)
        return [
            PromptTask(
                rollout_id=f"{asked.name}/{number}/0",
                run_id=asked.name,
                prompt_index=number,
                attempt=0,
                token_ids=encode_prompt(prompt, self._tokenizer),
                text=prompt.text,
                metadata=prompt.metadata,
                sampling=replace(sampling, seed=asked.seed + number * asked.completions),
                stopping=stopping,
                at_least=None,
                tokenizer_sha256=self._tokenizer_sha256,
            )
            for number, prompt in enumerate(asked.prompts)
        ]


def _groups(tasks: Sequence[PromptTask]) -> list[Sequence[PromptTask]]:
    most = max(1, MAX_COMPLETIONS // tasks[0].sampling.completions) if tasks else 1
    return [tasks[start : start + most] for start in range(0, len(tasks), most)]


def _sampled(task: PromptTask, generated: Generated) -> Sampled:
    """A completion that two versions wrote counts as the later one's."""
    last = max((span.version for each in generated.completions for span in each.versions), default=None)
    if last is None:
        raise ModelError("the policy service does not say whose weights its completions are of")
    return Sampled(
        prompt_index=task.prompt_index,
        prompt=task.text,
        metadata=dict(task.metadata),
        completions=tuple(map(_completion, generated.completions)),
        sampling=generated.sampling,
        version=last,
    )


def _as_generated(sampled: Sampled) -> Generated:
    """As if the policy had just answered."""
    completions = tuple(
        Completion(
            prompt_index=0,
            completion_index=number,
            token_ids=np.asarray(each.token_ids, dtype=np.int32),
            logprobs=None,
            logprob_mode=LogprobMode.NONE,
            text=each.text,
            finish_reason=each.finish_reason,
            stopped_by="",
            versions=(),
            seed=each.seed,
        )
        for number, each in enumerate(sampled.completions)
    )
    return Generated(completions, sampled.sampling)


def _completion(completion: Completion) -> SampledCompletion:
    assert completion.logprobs is not None, "the services are asked for them"
    return SampledCompletion(
        completion.text,
        tuple(completion.token_ids.tolist()),
        tuple(completion.logprobs.tolist()),
        completion.finish_reason,
        completion.seed,
    )
