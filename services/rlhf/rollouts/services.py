"""The worker's three services as functions of a task: what is asked, and what of the answer is checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import numpy as np

from rlhf.errors import RlhfError
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.serving.client import call, connect
from rlhf.v1 import policy_pb2, policy_pb2_grpc, reference_pb2, reference_pb2_grpc, reward_pb2, reward_pb2_grpc
from rlhf.wire.messages import from_completion, from_sampling, to_sampling, to_stopping, to_version
from rlhf.wire.records import Completion, Floats, LogprobMode, PromptTask, Sampling, Tokens
from rlhf.wire.tensors import from_ragged, from_tensor, to_ragged, to_tensor


@dataclass(frozen=True)
class Generated:
    completions: tuple[Completion, ...]
    """K, with log-probs at the sampling temperature."""
    sampling: Sampling
    """As applied."""


@dataclass(frozen=True)
class Scores:
    scores: Floats
    """[K]"""
    member_scores: Floats
    """[K, M]"""
    model_sha256: str


@dataclass(frozen=True)
class References:
    logprobs: tuple[Floats, ...]
    """K arrays, one log-prob per response token."""
    model_sha256: str


class Services:
    """Build with `Services.connected`. Every method raises RlhfError: the server's, or for an answer of no use."""

    def __init__(
        self,
        policy: policy_pb2_grpc.PolicyServiceAsyncStub,
        reward: reward_pb2_grpc.RewardServiceAsyncStub,
        reference: reference_pb2_grpc.ReferenceServiceAsyncStub,
        settings: RolloutsSettings,
    ) -> None:
        self._policy = policy
        self._reward = reward
        self._reference = reference
        self._settings = settings

    @classmethod
    @asynccontextmanager
    async def connected(cls, settings: RolloutsSettings) -> AsyncIterator[Services]:
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
            )

    async def generate(self, task: PromptTask) -> Generated:
        """K completions. The rollout's id is the request's: asked again, the policy gives the same answer."""
        request = policy_pb2.GenerateRequest(
            request_id=task.rollout_id,
            prompts=[policy_pb2.Prompt(token_ids=to_tensor(task.token_ids, np.int32))],
            sampling=to_sampling(task.sampling),
            stopping=to_stopping(task.stopping),
            logprob_mode=policy_pb2.LOGPROB_MODE_TEMPERATURE,
            tokenizer_sha256=task.tokenizer_sha256,
        )
        if task.at_least is not None:
            request.weights.at_least.CopyFrom(to_version(task.at_least))
        response = await call(self._policy.Generate, request, timeout_s=self._settings.generate_timeout_s)
        completions = tuple(from_completion(completion) for completion in response.completions)
        _expect(len(completions) == task.sampling.completions, "policy", f"{len(completions)} completions", task)
        for index, completion in enumerate(completions):
            _check_completion(completion, index, task)
        return Generated(completions, from_sampling(response.sampling))

    async def score(self, task: PromptTask, completions: Sequence[Completion]) -> Scores:
        """Tokens with their text beside them, so that a reward model with another tokenizer or a rule can answer."""
        texts = [reward_pb2.TextItem(prompt=task.text, completion=completion.text) for completion in completions]
        prompt_lengths = np.full(len(completions), len(task.token_ids), dtype=np.int64)
        request = reward_pb2.ScoreRequest(
            request_id=task.rollout_id,
            tokens=reward_pb2.TokenBatch(
                token_ids=to_ragged(sequences(task, completions), np.int32),
                prompt_lengths=to_tensor(prompt_lengths),
                tokenizer_sha256=task.tokenizer_sha256,
            ),
            decoded=reward_pb2.TextBatch(items=texts),
            metadata=[reward_pb2.Metadata(fields=task.metadata)] * len(completions),
        )
        response = await call(self._reward.Score, request, timeout_s=self._settings.score_timeout_s)
        scores = from_tensor(response.scores, "scores", dtypes="f", ndim=1)
        members = from_tensor(response.member_scores, "member_scores", dtypes="f", ndim=2)
        counts = f"{len(scores)} scores and {len(members)} rows of member scores"
        _expect(len(scores) == len(members) == len(completions), "reward", counts, task)
        _expect(bool(np.isfinite(scores).all() and np.isfinite(members).all()), "reward", "a score not finite", task)
        return Scores(scores, members, response.model_sha256)

    async def refer(self, task: PromptTask, completions: Sequence[Completion]) -> References:
        """At the temperature of the policy's log-probs: raw ones where it picks the most likely token."""
        first_scored = np.full(len(completions), len(task.token_ids), dtype=np.int64)
        request = reference_pb2.LogProbsRequest(
            request_id=task.rollout_id,
            token_ids=to_ragged(sequences(task, completions), np.int32),
            first_scored=to_tensor(first_scored),
            temperature=task.sampling.temperature or 1.0,
            tokenizer_sha256=task.tokenizer_sha256,
        )
        response = await call(self._reference.LogProbs, request, timeout_s=self._settings.score_timeout_s)
        rows = tuple(from_ragged(response.logprobs, "logprobs", dtypes="f"))
        lengths = [len(row) for row in rows]
        expected = [len(completion.token_ids) for completion in completions]
        _expect(lengths == expected, "reference", f"log-probs of lengths {lengths} for tokens of {expected}", task)
        _expect(all(np.isfinite(row).all() for row in rows), "reference", "a log-prob not finite", task)
        return References(rows, response.model_sha256)


def sequences(task: PromptTask, completions: Sequence[Completion]) -> list[Tokens]:
    """K arrays [T], prompt and response."""
    return [np.concatenate([task.token_ids, completion.token_ids]) for completion in completions]


def _check_completion(completion: Completion, index: int, task: PromptTask) -> None:
    """What `from_completion` has not checked: it knows neither the task nor that a rollout needs log-probs."""
    mode = completion.logprob_mode
    _expect(completion.completion_index == index, "policy", "completions out of order", task)
    _expect(len(completion.token_ids) > 0, "policy", "a completion without tokens", task)
    _expect(mode is LogprobMode.TEMPERATURE, "policy", f"log-probs of mode {mode.name}", task)


def _expect(holds: bool, service: str, got: str, task: PromptTask) -> None:
    if not holds:
        raise RlhfError(
            f"the {service} service answered {got} to {task.rollout_id} ({task.sampling.completions} completions asked)"
        )
