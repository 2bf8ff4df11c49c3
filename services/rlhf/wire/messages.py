"""Records <-> protobuf messages, one pair of functions per record."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rlhf.errors import RequestError
from rlhf.v1 import policy_pb2, rollout_pb2, weights_pb2
from rlhf.wire.records import (
    Completion,
    FinishReason,
    LogprobMode,
    PromptTask,
    Rollout,
    Sampling,
    ScoredCompletion,
    Stopping,
    VersionSpan,
    WeightVersion,
)
from rlhf.wire.tensors import from_tensor, to_tensor


def to_version(version: WeightVersion) -> weights_pb2.WeightVersion:
    return weights_pb2.WeightVersion(
        run_id=version.run_id, epoch=version.epoch, step=version.step, sha256=version.sha256
    )


def from_version(message: weights_pb2.WeightVersion) -> WeightVersion:
    return WeightVersion(message.run_id, message.epoch, message.step, message.sha256)


def to_spans(spans: Iterable[VersionSpan]) -> list[weights_pb2.VersionSpan]:
    return [weights_pb2.VersionSpan(version=to_version(s.version), start=s.start, end=s.end) for s in spans]


def from_spans(messages: Iterable[weights_pb2.VersionSpan]) -> tuple[VersionSpan, ...]:
    return tuple(VersionSpan(from_version(m.version), m.start, m.end) for m in messages)


def to_sampling(sampling: Sampling) -> policy_pb2.Sampling:
    return policy_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        completions=sampling.completions,
    )


def from_sampling(message: policy_pb2.Sampling) -> Sampling:
    """Absent numbers take the value that the proto states beside them."""
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        seed=message.seed if message.HasField("seed") else None,
        completions=message.completions if message.HasField("completions") else 1,
    )


def to_stopping(stopping: Stopping) -> policy_pb2.Stopping:
    return policy_pb2.Stopping(
        max_new_tokens=stopping.max_new_tokens,
        min_new_tokens=stopping.min_new_tokens,
        stop_token_ids=stopping.stop_token_ids,
        stop_strings=stopping.stop_strings,
        ignore_eos=stopping.ignore_eos,
    )


def from_stopping(message: policy_pb2.Stopping, max_new_tokens: int) -> Stopping:
    """An absent `max_new_tokens` takes the server's limit, given here."""
    return Stopping(
        max_new_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else max_new_tokens,
        min_new_tokens=message.min_new_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        stop_strings=tuple(message.stop_strings),
        ignore_eos=message.ignore_eos,
    )


def to_prompt_task(task: PromptTask) -> rollout_pb2.PromptTask:
    return rollout_pb2.PromptTask(
        rollout_id=task.rollout_id,
        run_id=task.run_id,
        prompt_index=task.prompt_index,
        attempt=task.attempt,
        token_ids=to_tensor(task.token_ids, np.int32),
        text=task.text,
        metadata=task.metadata,
        sampling=to_sampling(task.sampling),
        stopping=to_stopping(task.stopping),
        at_least=None if task.at_least is None else to_version(task.at_least),
        tokenizer_sha256=task.tokenizer_sha256,
    )


def from_prompt_task(message: rollout_pb2.PromptTask) -> PromptTask:
    return PromptTask(
        rollout_id=message.rollout_id,
        run_id=message.run_id,
        prompt_index=message.prompt_index,
        attempt=message.attempt,
        token_ids=from_tensor(message.token_ids, "token_ids", dtypes="i", ndim=1),
        text=message.text,
        metadata=dict(message.metadata),
        sampling=from_sampling(message.sampling),
        stopping=from_stopping(message.stopping, message.stopping.max_new_tokens),
        at_least=from_version(message.at_least) if message.HasField("at_least") else None,
        tokenizer_sha256=message.tokenizer_sha256,
    )


def to_completion(completion: Completion) -> policy_pb2.Completion:
    return policy_pb2.Completion(
        prompt_index=completion.prompt_index,
        completion_index=completion.completion_index,
        token_ids=to_tensor(completion.token_ids, np.int32),
        logprobs=None if completion.logprobs is None else to_tensor(completion.logprobs, np.float32),
        logprob_mode=completion.logprob_mode.value,  # type: ignore[arg-type]
        text=completion.text,
        finish_reason=completion.finish_reason.value,  # type: ignore[arg-type]
        stopped_by=completion.stopped_by,
        versions=to_spans(completion.versions),
        seed=completion.seed,
    )


def from_completion(message: policy_pb2.Completion) -> Completion:
    """
    Raises:
        RequestError: log-probs are missing though their mode says they are there, or their number is not the tokens'.
    """
    token_ids = from_tensor(message.token_ids, "completion.token_ids", dtypes="i", ndim=1)
    mode = LogprobMode(message.logprob_mode)
    logprobs = None
    if mode is not LogprobMode.NONE:
        logprobs = from_tensor(message.logprobs, "completion.logprobs", dtypes="f", ndim=1)
        if len(logprobs) != len(token_ids):
            raise RequestError(f"completion.logprobs: {len(logprobs)} for {len(token_ids)} tokens")
    return Completion(
        prompt_index=message.prompt_index,
        completion_index=message.completion_index,
        token_ids=token_ids,
        logprobs=logprobs,
        logprob_mode=mode,
        text=message.text,
        finish_reason=FinishReason(message.finish_reason),
        stopped_by=message.stopped_by,
        versions=from_spans(message.versions),
        seed=message.seed,
    )


def to_scored_completion(scored: ScoredCompletion) -> rollout_pb2.ScoredCompletion:
    return rollout_pb2.ScoredCompletion(
        token_ids=to_tensor(scored.token_ids, np.int32),
        response_mask=to_tensor(scored.response_mask, np.bool_),
        logprobs=to_tensor(scored.logprobs, np.float32),
        ref_logprobs=to_tensor(scored.ref_logprobs, np.float32),
        score=scored.score,
        member_scores=to_tensor(scored.member_scores, np.float32),
        token_rewards=None if scored.token_rewards is None else to_tensor(scored.token_rewards, np.float32),
        versions=to_spans(scored.versions),
        finish_reason=scored.finish_reason.value,  # type: ignore[arg-type]
        seed=scored.seed,
        text=scored.text,
    )


def from_scored_completion(message: rollout_pb2.ScoredCompletion) -> ScoredCompletion:
    """
    Raises:
        RequestError: an array is missing, of another length, or not finite where a number is needed.
    """
    scored = ScoredCompletion(
        token_ids=from_tensor(message.token_ids, "token_ids", dtypes="i", ndim=1),
        response_mask=from_tensor(message.response_mask, "response_mask", dtypes="b", ndim=1),
        logprobs=from_tensor(message.logprobs, "logprobs", dtypes="f", ndim=1),
        ref_logprobs=from_tensor(message.ref_logprobs, "ref_logprobs", dtypes="f", ndim=1),
        score=message.score,
        member_scores=from_tensor(message.member_scores, "member_scores", dtypes="f", ndim=1),
        token_rewards=(
            from_tensor(message.token_rewards, "token_rewards", dtypes="f", ndim=1)
            if message.HasField("token_rewards")
            else None
        ),
        versions=from_spans(message.versions),
        finish_reason=FinishReason(message.finish_reason),
        seed=message.seed,
        text=message.text,
    )
    _check(scored)
    return scored


def to_rollout(rollout: Rollout) -> rollout_pb2.Rollout:
    return rollout_pb2.Rollout(
        rollout_id=rollout.rollout_id,
        run_id=rollout.run_id,
        prompt_index=rollout.prompt_index,
        attempt=rollout.attempt,
        prompt=rollout.prompt,
        metadata=rollout.metadata,
        completions=[to_scored_completion(completion) for completion in rollout.completions],
        sampling=to_sampling(rollout.sampling),
        reward_sha256=rollout.reward_sha256,
        reference_sha256=rollout.reference_sha256,
        worker=rollout.worker,
        created_unix_s=rollout.created_unix_s,
    )


def from_rollout(message: rollout_pb2.Rollout) -> Rollout:
    return Rollout(
        rollout_id=message.rollout_id,
        run_id=message.run_id,
        prompt_index=message.prompt_index,
        attempt=message.attempt,
        prompt=message.prompt,
        metadata=dict(message.metadata),
        completions=tuple(from_scored_completion(completion) for completion in message.completions),
        sampling=from_sampling(message.sampling),
        reward_sha256=message.reward_sha256,
        reference_sha256=message.reference_sha256,
        worker=message.worker,
        created_unix_s=message.created_unix_s,
    )


def _check(scored: ScoredCompletion) -> None:
    length = len(scored.token_ids)
    per_token = {
        "response_mask": scored.response_mask,
        "logprobs": scored.logprobs,
        "ref_logprobs": scored.ref_logprobs,
    }
    if scored.token_rewards is not None:
        per_token["token_rewards"] = scored.token_rewards
    for name, array in per_token.items():
        if len(array) != length:
            raise RequestError(f"{name}: {len(array)} entries for {length} tokens")
    for name in ("logprobs", "ref_logprobs"):
        if not np.isfinite(per_token[name][scored.response_mask]).all():
            raise RequestError(f"{name}: not finite on a sampled token")
    if not np.isfinite(scored.score) or not np.isfinite(scored.member_scores).all():
        raise RequestError("score: not finite")
    if scored.token_rewards is not None and not np.isfinite(scored.token_rewards[scored.response_mask]).all():
        raise RequestError("token_rewards: not finite on a sampled token")
