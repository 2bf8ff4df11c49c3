"""Records <-> protobuf messages, one pair of functions per record.

`to_…` trusts the record; `from_…` trusts nothing: what comes back holds what the record's fields promise, or a
RequestError says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TypeVar

import numpy as np

from rlhf.errors import RequestError
from rlhf.v1 import policy_pb2, rollout_pb2, tensor_pb2, weights_pb2
from rlhf.wire.records import (
    Completion,
    FinishReason,
    Floats,
    LogprobMode,
    Mask,
    PromptTask,
    Rollout,
    Sampling,
    ScoredCompletion,
    Stopping,
    Tokens,
    VersionSpan,
    WeightVersion,
)
from rlhf.wire.tensors import from_hidden_states, from_tensor, to_hidden_states, to_tensor

E = TypeVar("E", bound=Enum)


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
        ref_hidden_states=task.ref_hidden_states,
    )


def from_prompt_task(message: rollout_pb2.PromptTask) -> PromptTask:
    """
    Raises:
        RequestError: the id, the tokens or the limit of new tokens is missing.
    """
    _require_id(message.rollout_id)
    if not message.stopping.HasField("max_new_tokens"):
        raise RequestError("stopping.max_new_tokens: a prompt in the queue must state it")
    return PromptTask(
        rollout_id=message.rollout_id,
        run_id=message.run_id,
        prompt_index=message.prompt_index,
        attempt=message.attempt,
        token_ids=_tokens(message.token_ids, "token_ids"),
        text=message.text,
        metadata=dict(message.metadata),
        sampling=from_sampling(message.sampling),
        stopping=from_stopping(message.stopping, message.stopping.max_new_tokens),
        at_least=from_version(message.at_least) if message.HasField("at_least") else None,
        tokenizer_sha256=message.tokenizer_sha256,
        ref_hidden_states=message.ref_hidden_states,
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
        RequestError: log-probs are missing or not finite though their mode says they are there, arrays differ in
            length, an enum has no known value, or the versions do not cover the tokens.
    """
    token_ids = _tokens(message.token_ids, "completion.token_ids")
    mode = _enum(LogprobMode, message.logprob_mode, "completion.logprob_mode")
    logprobs = None
    if mode is not LogprobMode.NONE:
        logprobs = _floats(message.logprobs, "completion.logprobs")
        if len(logprobs) != len(token_ids):
            raise RequestError(f"completion.logprobs: {len(logprobs)} for {len(token_ids)} tokens")
        if not np.isfinite(logprobs).all():
            raise RequestError("completion.logprobs: not finite on a sampled token")
    versions = from_spans(message.versions)
    _check_spans(versions, len(token_ids))
    return Completion(
        prompt_index=message.prompt_index,
        completion_index=message.completion_index,
        token_ids=token_ids,
        logprobs=logprobs,
        logprob_mode=mode,
        text=message.text,
        finish_reason=_enum(FinishReason, message.finish_reason, "completion.finish_reason"),
        stopped_by=message.stopped_by,
        versions=versions,
        seed=message.seed,
    )


def to_scored_completion(scored: ScoredCompletion) -> rollout_pb2.ScoredCompletion:
    return rollout_pb2.ScoredCompletion(
        token_ids=to_tensor(scored.token_ids, np.int32),
        response_mask=to_tensor(scored.response_mask, np.bool_),
        logprobs=to_tensor(scored.logprobs, np.float32),
        ref_logprobs=None if scored.ref_logprobs is None else to_tensor(scored.ref_logprobs, np.float32),
        score=scored.score,
        member_scores=to_tensor(scored.member_scores, np.float32),
        token_rewards=None if scored.token_rewards is None else to_tensor(scored.token_rewards, np.float32),
        versions=to_spans(scored.versions),
        finish_reason=scored.finish_reason.value,  # type: ignore[arg-type]
        seed=scored.seed,
        text=scored.text,
        ref_hidden_states=None if scored.ref_hidden is None else to_hidden_states(scored.ref_hidden),
    )


def from_scored_completion(message: rollout_pb2.ScoredCompletion) -> ScoredCompletion:
    """
    Raises:
        RequestError: an array is missing, of another length, or not finite where a number is needed; an enum has no
            known value; the versions do not cover the sampled tokens; not one, and one alone, of the reference's
            log-probs and hidden states is there.
    """
    has_hidden = message.HasField("ref_hidden_states")
    if message.HasField("ref_logprobs") == has_hidden:
        received = "both" if has_hidden else "neither"
        raise RequestError(f"ref_logprobs, ref_hidden_states: one of the two expected, {received} received")
    token_rewards = _floats(message.token_rewards, "token_rewards") if message.HasField("token_rewards") else None
    scored = ScoredCompletion(
        token_ids=_tokens(message.token_ids, "token_ids"),
        response_mask=_mask(message.response_mask, "response_mask"),
        logprobs=_floats(message.logprobs, "logprobs"),
        ref_logprobs=None if has_hidden else _floats(message.ref_logprobs, "ref_logprobs"),
        score=message.score,
        member_scores=_floats(message.member_scores, "member_scores"),
        token_rewards=token_rewards,
        versions=from_spans(message.versions),
        finish_reason=_enum(FinishReason, message.finish_reason, "finish_reason"),
        seed=message.seed,
        text=message.text,
        ref_hidden=from_hidden_states(message.ref_hidden_states, "ref_hidden_states") if has_hidden else None,
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
    """
    Raises:
        RequestError: the id or every completion is missing, or a completion cannot be used.
    """
    _require_id(message.rollout_id)
    if not message.completions:
        raise RequestError(f"rollout {message.rollout_id}: it has no completion")
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


def _require_id(rollout_id: str) -> None:
    if not rollout_id:
        raise RequestError("rollout_id: empty, as in a message that somebody else wrote")


def _tokens(message: tensor_pb2.Tensor, name: str) -> Tokens:
    """[N] int32, also from int64 where the ids fit."""
    ids = from_tensor(message, name, dtypes="i", ndim=1)
    if len(ids) and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise RequestError(f"{name}: token ids from {ids.min()} to {ids.max()}, a token id is 0 to 2^31 - 1")
    return ids.astype(np.int32, copy=False)


def _floats(message: tensor_pb2.Tensor, name: str) -> Floats:
    """[N] float32, also from float16."""
    return from_tensor(message, name, dtypes="f", ndim=1).astype(np.float32, copy=False)


def _mask(message: tensor_pb2.Tensor, name: str) -> Mask:
    return from_tensor(message, name, dtypes="b", ndim=1)


def _enum(kind: type[E], number: int, name: str) -> E:
    try:
        return kind(number)
    except ValueError as error:
        raise RequestError(f"{name}: {number} is none of {[member.name for member in kind]}") from error


def _check_spans(spans: Iterable[VersionSpan], tokens: int) -> None:
    """Every sampled token has one version: without it nobody knows how old it is."""
    reached = 0
    for span in spans:
        if span.start != reached or span.end <= span.start:
            raise RequestError(f"versions: a span from {span.start} to {span.end} where one from {reached} is due")
        reached = span.end
    if reached != tokens:
        raise RequestError(f"versions: they cover {reached} of {tokens} sampled tokens")


def _check(scored: ScoredCompletion) -> None:
    length, mask = len(scored.token_ids), scored.response_mask
    if len(mask) != length:
        raise RequestError(f"response_mask: {len(mask)} entries for {length} tokens")
    per_token = {
        "logprobs": scored.logprobs,
        "ref_logprobs": scored.ref_logprobs,
        "token_rewards": scored.token_rewards,
    }
    for name, array in per_token.items():
        if array is not None and len(array) != length:
            raise RequestError(f"{name}: {len(array)} entries for {length} tokens")
        if array is not None and not np.isfinite(array[mask]).all():
            raise RequestError(f"{name}: not finite on a sampled token")
    sampled = int(mask.sum())
    if scored.ref_hidden is not None and scored.ref_hidden.shape[0] != sampled:
        raise RequestError(f"ref_hidden_states: {scored.ref_hidden.shape[0]} rows for {sampled} sampled tokens")
    if not np.isfinite(scored.score) or not np.isfinite(scored.member_scores).all():
        raise RequestError("score: not finite")
    _check_spans(scored.versions, sampled)
