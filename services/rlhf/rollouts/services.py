"""The worker's three services as functions of a few tasks: what is asked, and what of the answer is checked.

Tasks go into one call because a call costs more than a small model's answer. Which may is for `rollouts.groups` to say.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from rlhf.errors import RlhfError
from rlhf.ppo.settings import ShapingSettings
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.serving.client import call, connect
from rlhf.v1 import (
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    tensor_pb2,
)
from rlhf.wire.messages import from_completion, from_sampling, to_sampling, to_stopping, to_version
from rlhf.wire.records import Completion, Floats, HiddenStates, LogprobMode, PromptTask, Sampling, Tokens
from rlhf.wire.tensors import from_hidden_states, from_ragged, from_tensor, to_ragged, to_tensor

T = TypeVar("T")

WHOLE = ShapingSettings()
"""Completions are scored as they are."""

_ANSWERS = {False: reference_pb2.ANSWER_LOGPROBS, True: reference_pb2.ANSWER_HIDDEN_STATES}
"""What the reference is asked for, by a task's `ref_hidden_states`."""


@dataclass(frozen=True)
class Generated:
    """The answer to one task."""

    completions: tuple[Completion, ...]
    """K, with log-probs at the sampling temperature."""
    sampling: Sampling
    """As applied; the seed is the first completion's."""


@dataclass(frozen=True)
class Scores:
    scores: Floats
    """[K]"""
    member_scores: Floats
    """[K, M]"""
    model_sha256: str


@dataclass(frozen=True)
class References:
    answers: tuple[Floats | HiddenStates, ...]
    """K, of one kind: for each response token a log-prob [R], or the state that it was predicted from [R, H]."""
    model_sha256: str


class Services:
    """Build with `Services.connected`. Every method raises RlhfError: the server's, or for an answer of no use."""

    def __init__(
        self,
        policy: policy_pb2_grpc.PolicyServiceAsyncStub,
        reward: reward_pb2_grpc.RewardServiceAsyncStub,
        reference: reference_pb2_grpc.ReferenceServiceAsyncStub,
        settings: RolloutsSettings,
        shaping: ShapingSettings,
    ) -> None:
        self._policy = policy
        self._reward = reward
        self._reference = reference
        self._settings = settings
        self._shaping = shaping

    @classmethod
    @asynccontextmanager
    async def connected(cls, settings: RolloutsSettings, shaping: ShapingSettings = WHOLE) -> AsyncIterator[Services]:
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    connect(address, service=service, token_file=settings.token_file, tls_ca=settings.tls_ca)
                )
                for address, service in (
                    (settings.policy, "rlhf.v1.PolicyService"),
                    (settings.reward, "rlhf.v1.RewardService"),
                    (settings.reference, "rlhf.v1.ReferenceService"),
                )
            ]
            yield cls(
                policy_pb2_grpc.PolicyServiceStub(channels[0]),
                reward_pb2_grpc.RewardServiceStub(channels[1]),
                reference_pb2_grpc.ReferenceServiceStub(channels[2]),
                settings,
                shaping,
            )

    async def generate(self, tasks: Sequence[PromptTask]) -> list[Generated]:
        """Of tasks that may share a call, for each its K completions."""
        response = await call(
            self._policy.Generate, generate_request(tasks), timeout_s=self._settings.generate_timeout_s
        )
        each = tasks[0].sampling.completions
        completions = [from_completion(completion) for completion in response.completions]
        _expect(len(completions) == each * len(tasks), "policy", f"{len(completions)} completions", tasks)
        for number, completion in enumerate(completions):
            _check_completion(completion, divmod(number, each), tasks)
        applied = from_sampling(response.sampling)
        return [
            # The call's seed is its first prompt's.
            Generated(tuple(own), replace(applied, seed=own[0].seed))
            for own in in_rows(completions, [each] * len(tasks))
        ]

    async def score(self, tasks: Sequence[PromptTask], generated: Sequence[Generated]) -> list[Scores]:
        """Whole completions as tokens with their text beside them, so that a reward model with another tokenizer or a
        rule can answer; truncated ones as text alone, because where it is cut need not be the end of a token."""
        pairs = _pairs(tasks, generated)
        texts = reward_pb2.TextBatch(
            items=[
                reward_pb2.TextItem(prompt=task.text, completion=self._shaping.scored(completion.text))
                for task, completion in pairs
            ]
        )
        request = reward_pb2.ScoreRequest(
            request_id=tasks[0].rollout_id, metadata=[reward_pb2.Metadata(fields=task.metadata) for task, _ in pairs]
        )
        if self._shaping.truncate_at is None:
            tokens = reward_pb2.TokenBatch(
                token_ids=to_ragged(_sequences(pairs), np.int32),
                prompt_lengths=_prompt_lengths(pairs),
                tokenizer_sha256=tasks[0].tokenizer_sha256,
            )
            request.tokens.CopyFrom(tokens)
            request.decoded.CopyFrom(texts)
        else:
            request.texts.CopyFrom(texts)
        response = await call(self._reward.Score, request, timeout_s=self._settings.score_timeout_s)
        scores = from_tensor(response.scores, "scores", dtypes="f", ndim=1)
        members = from_tensor(response.member_scores, "member_scores", dtypes="f", ndim=2)
        counts = f"{len(scores)} scores and {len(members)} rows of member scores"
        _expect(len(scores) == len(members) == len(pairs), "reward", counts, tasks)
        _expect(bool(np.isfinite(scores).all() and np.isfinite(members).all()), "reward", "a score not finite", tasks)
        ends = np.cumsum([len(one.completions) for one in generated])[:-1]
        return [
            Scores(own, own_members, response.model_sha256)
            for own, own_members in zip(np.split(scores, ends), np.split(members, ends), strict=True)
        ]

    async def refer(self, tasks: Sequence[PromptTask], generated: Sequence[Generated]) -> list[References]:
        """Log-probs at the temperature of the policy's (raw ones where it picks the most likely token), or, where the
        tasks say so, hidden states."""
        pairs = _pairs(tasks, generated)
        request = reference_pb2.LogProbsRequest(
            request_id=tasks[0].rollout_id,
            token_ids=to_ragged(_sequences(pairs), np.int32),
            first_scored=_prompt_lengths(pairs),
            temperature=tasks[0].sampling.temperature or 1.0,
            tokenizer_sha256=tasks[0].tokenizer_sha256,
            answer=_ANSWERS[tasks[0].ref_hidden_states],
        )
        response = await call(self._reference.LogProbs, request, timeout_s=self._settings.score_timeout_s)
        expected = [len(completion.token_ids) for _, completion in pairs]
        read = _hidden_states if tasks[0].ref_hidden_states else _logprobs
        counts = [len(one.completions) for one in generated]
        return [
            References(tuple(own), response.model_sha256) for own in in_rows(read(response, expected, tasks), counts)
        ]


def generate_request(tasks: Sequence[PromptTask]) -> policy_pb2.GenerateRequest:
    """Asked again with the same tasks, the policy gives the same answer: it knows them by the request's id.

    The id tells other tasks, another order and other contents of the same tasks apart, because the policy refuses two
    requests under one id.
    """
    first = tasks[0]
    request = policy_pb2.GenerateRequest(
        prompts=[policy_pb2.Prompt(token_ids=to_tensor(task.token_ids, np.int32)) for task in tasks],
        seeds=[task.sampling.seed for task in tasks if task.sampling.seed is not None],
        sampling=to_sampling(replace(first.sampling, seed=None)),
        stopping=to_stopping(first.stopping),
        logprob_mode=policy_pb2.LOGPROB_MODE_TEMPERATURE,
        tokenizer_sha256=first.tokenizer_sha256,
    )
    if first.at_least is not None:
        request.weights.at_least.CopyFrom(to_version(first.at_least))
    content = hashlib.sha256(request.SerializeToString(deterministic=True))
    content.update(json.dumps([task.rollout_id for task in tasks]).encode())
    request.request_id = f"{first.rollout_id}+{len(tasks) - 1}/{content.hexdigest()[:32]}"
    return request


def in_rows(flat: Sequence[T], lengths: Sequence[int]) -> list[Sequence[T]]:
    """What lies end to end, apart again."""
    ends = list(itertools.accumulate(lengths))
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _pairs(tasks: Sequence[PromptTask], generated: Sequence[Generated]) -> list[tuple[PromptTask, Completion]]:
    """Every completion of a call, in order, beside the task it answers."""
    return [(task, completion) for task, one in zip(tasks, generated, strict=True) for completion in one.completions]


def _sequences(pairs: Sequence[tuple[PromptTask, Completion]]) -> list[Tokens]:
    """Arrays [T], prompt and response."""
    return [np.concatenate([task.token_ids, completion.token_ids]) for task, completion in pairs]


def _prompt_lengths(pairs: Sequence[tuple[PromptTask, Completion]]) -> tensor_pb2.Tensor:
    return to_tensor(np.array([len(task.token_ids) for task, _ in pairs], dtype=np.int64))


def _logprobs(
    response: reference_pb2.LogProbsResponse, expected: list[int], tasks: Sequence[PromptTask]
) -> list[Floats | HiddenStates]:
    """
    Args:
        expected: number of response tokens of each completion of the call.
    """
    rows = from_ragged(response.logprobs, "logprobs", dtypes="f")
    lengths = [len(row) for row in rows]
    _expect(lengths == expected, "reference", f"log-probs of lengths {lengths} for tokens of {expected}", tasks)
    _expect(all(np.isfinite(row).all() for row in rows), "reference", "a log-prob not finite", tasks)
    return list(rows)


def _hidden_states(
    response: reference_pb2.LogProbsResponse, expected: list[int], tasks: Sequence[PromptTask]
) -> list[Floats | HiddenStates]:
    states = [from_hidden_states(message, "hidden_states") for message in response.hidden_states]
    lengths = [one.shape[0] for one in states]
    kinds = {(one.shape[1], one.dtype) for one in states}
    _expect(lengths == expected, "reference", f"hidden states of lengths {lengths} for tokens of {expected}", tasks)
    _expect(len(kinds) == 1, "reference", f"hidden states of several widths or dtypes, {sorted(kinds)},", tasks)
    return list(states)


def _check_completion(completion: Completion, place: tuple[int, int], tasks: Sequence[PromptTask]) -> None:
    """What `from_completion` has not checked: it knows neither the tasks nor that a rollout needs log-probs.

    Args:
        place: of its prompt in the call, and of it among that prompt's completions.
    """
    mode = completion.logprob_mode
    found = completion.prompt_index, completion.completion_index
    _expect(found == place, "policy", "completions out of order", tasks)
    _expect(len(completion.token_ids) > 0, "policy", "a completion without tokens", tasks)
    _expect(mode is LogprobMode.TEMPERATURE, "policy", f"log-probs of mode {mode.name}", tasks)


def _expect(holds: bool, service: str, got: str, tasks: Sequence[PromptTask]) -> None:
    if not holds:
        asked = len(tasks) * tasks[0].sampling.completions
        raise RlhfError(f"the {service} service answered {got} to {_name(tasks)} ({asked} completions asked)")


def _name(tasks: Sequence[PromptTask]) -> str:
    return tasks[0].rollout_id + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
