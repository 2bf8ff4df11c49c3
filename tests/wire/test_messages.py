from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import RequestError
from rlhf.v1 import policy_pb2, rollout_pb2
from rlhf.wire import messages
from rlhf.wire.records import (
    Completion,
    FinishReason,
    HiddenStates,
    LogprobMode,
    PromptTask,
    Rollout,
    Sampling,
    ScoredCompletion,
    Stopping,
    VersionSpan,
    WeightVersion,
)

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ids = texts.filter(bool)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
metadata = st.dictionaries(texts, texts, max_size=3)
versions = st.builds(WeightVersion, texts, uint32, uint64, texts)
samplings = st.builds(
    Sampling, floats32, uint32, floats32, floats32, floats32, st.none() | uint64, st.integers(1, 2**32 - 1)
)
stoppings = st.builds(Stopping, uint32, uint32, st.lists(uint32).map(tuple), st.lists(texts).map(tuple), st.booleans())
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(lambda x: np.array(x, np.int32))


@st.composite
def spans(draw: st.DrawFn, length: int) -> tuple[VersionSpan, ...]:
    if length == 0:
        return ()
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3))})
    return tuple(VersionSpan(draw(versions), a, b) for a, b in itertools.pairwise(cuts))


def array_of(length: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(floats32, min_size=length, max_size=length).map(lambda x: np.array(x, np.float32))


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    token_ids = draw(tokens)
    mode = draw(st.sampled_from(LogprobMode))
    return Completion(
        prompt_index=draw(uint32),
        completion_index=draw(uint32),
        token_ids=token_ids,
        logprobs=None if mode is LogprobMode.NONE else draw(array_of(len(token_ids))),
        logprob_mode=mode,
        text=draw(texts),
        finish_reason=draw(st.sampled_from(FinishReason)),
        stopped_by=draw(texts),
        versions=draw(spans(len(token_ids))),
        seed=draw(uint64),
    )


@st.composite
def scored_completions(draw: st.DrawFn) -> ScoredCompletion:
    token_ids = draw(tokens)
    length = len(token_ids)
    mask = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)), np.bool_)
    by_logprobs = draw(st.booleans())
    return ScoredCompletion(
        token_ids=token_ids,
        response_mask=mask,
        logprobs=np.where(mask, draw(array_of(length)), np.float32(np.nan)).astype(np.float32),
        ref_logprobs=np.where(mask, draw(array_of(length)), np.float32(np.nan)) if by_logprobs else None,
        score=draw(floats32),
        member_scores=draw(array_of(draw(st.integers(0, 3)))),
        token_rewards=draw(st.none() | array_of(length)),
        versions=draw(spans(int(mask.sum()))),
        finish_reason=draw(st.sampled_from(FinishReason)),
        seed=draw(uint64),
        text=draw(texts),
        ref_hidden=None if by_logprobs else hidden_states(int(mask.sum())),
    )


def hidden_states(rows: int) -> HiddenStates:
    return HiddenStates("bfloat16", (rows, 2), bytes(range(rows * 4)))


tasks = st.builds(
    PromptTask,
    ids,
    texts,
    uint64,
    uint32,
    tokens,
    texts,
    metadata,
    samplings,
    stoppings,
    st.none() | versions,
    texts,
    st.booleans(),
)
rollouts = st.builds(
    Rollout,
    ids,
    texts,
    uint64,
    uint32,
    texts,
    metadata,
    st.lists(scored_completions(), min_size=1, max_size=2).map(tuple),
    samplings,
    texts,
    texts,
    texts,
    st.floats(0, 4e9),
)


def same(one: Any, two: Any) -> bool:
    """Equality of records: arrays bit for bit, with dtype and shape."""
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())
    if dataclasses.is_dataclass(one):
        return type(one) is type(two) and all(
            same(getattr(one, field.name), getattr(two, field.name)) for field in dataclasses.fields(one)
        )
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@given(versions)
def test_a_version_comes_back(version: WeightVersion) -> None:
    assert messages.from_version(messages.to_version(version)) == version


@given(samplings)
def test_sampling_comes_back(sampling: Sampling) -> None:
    assert same(messages.from_sampling(messages.to_sampling(sampling)), sampling)


@given(stoppings)
def test_stopping_comes_back(stopping: Stopping) -> None:
    assert messages.from_stopping(messages.to_stopping(stopping), max_new_tokens=9) == stopping


@given(tasks)
def test_a_prompt_comes_back(task: PromptTask) -> None:
    wire = messages.to_prompt_task(task).SerializeToString()
    assert same(messages.from_prompt_task(rollout_pb2.PromptTask.FromString(wire)), task)


@given(completions())
def test_a_completion_comes_back(completion: Completion) -> None:
    wire = messages.to_completion(completion).SerializeToString()
    assert same(messages.from_completion(policy_pb2.Completion.FromString(wire)), completion)


@given(rollouts)
def test_a_rollout_comes_back(rollout: Rollout) -> None:
    wire = messages.to_rollout(rollout).SerializeToString()
    assert same(messages.from_rollout(rollout_pb2.Rollout.FromString(wire)), rollout)


def test_what_is_absent_takes_the_value_in_the_proto() -> None:
    assert messages.from_sampling(policy_pb2.Sampling()) == Sampling()
    assert messages.from_sampling(policy_pb2.Sampling(temperature=0.0, top_p=0.0)) == Sampling(
        temperature=0.0, top_p=0.0
    )
    assert messages.from_stopping(policy_pb2.Stopping(), max_new_tokens=7) == Stopping(7)
    assert messages.from_stopping(policy_pb2.Stopping(max_new_tokens=0), max_new_tokens=7) == Stopping(0)


def version(step: int) -> WeightVersion:
    return WeightVersion("r", 0, step, "ab")


def scored(**changes: Any) -> ScoredCompletion:
    nan = float("nan")
    fields: dict[str, Any] = {
        "token_ids": np.array([5, 6, 7], np.int32),
        "response_mask": np.array([False, True, True]),
        "logprobs": np.array([nan, -1, -2], np.float32),
        "ref_logprobs": np.array([nan, -1, -3], np.float32),
        "score": 0.5,
        "member_scores": np.array([0.5], np.float32),
        "token_rewards": None,
        "versions": (VersionSpan(version(1), 0, 1), VersionSpan(version(2), 1, 2)),
        "finish_reason": FinishReason.EOS,
        "seed": 1,
        "text": "x",
    }
    return ScoredCompletion(**{**fields, **changes})


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"logprobs": f32(0, -1)}, "logprobs: 2 entries for 3 tokens"),
        ({"ref_logprobs": f32(0, -1, -1, -1)}, "ref_logprobs: 4 entries for 3 tokens"),
        ({"response_mask": np.array([True])}, "response_mask: 1 entries for 3 tokens"),
        ({"token_rewards": f32(0)}, "token_rewards: 1 entries for 3 tokens"),
        ({"logprobs": f32(0, np.nan, -1)}, "logprobs: not finite on a sampled token"),
        ({"ref_logprobs": f32(0, -1, -np.inf)}, "ref_logprobs: not finite on a sampled token"),
        ({"token_rewards": f32(0, np.inf, 0)}, "token_rewards: not finite"),
        ({"score": float("nan")}, "score: not finite"),
        ({"member_scores": f32(np.inf)}, "score: not finite"),
        ({"versions": ()}, "cover 0 of 2 sampled tokens"),
        ({"versions": (VersionSpan(version(1), 0, 1),)}, "cover 1 of 2 sampled tokens"),
        ({"versions": (VersionSpan(version(1), 1, 2),)}, "a span from 1 to 2 where one from 0 is due"),
        ({"versions": (VersionSpan(version(1), 0, 0),)}, "a span from 0 to 0"),
        ({"versions": (VersionSpan(version(1), 0, 3),)}, "cover 3 of 2 sampled tokens"),
        ({"token_ids": np.array([5, -1, 7], np.int32)}, "token ids from -1 to 7"),
        ({"ref_logprobs": None}, "one of the two expected, neither received"),
        ({"ref_hidden": hidden_states(2)}, "one of the two expected, both received"),
        ({"ref_logprobs": None, "ref_hidden": hidden_states(3)}, "ref_hidden_states: 3 rows for 2 sampled tokens"),
    ],
)
def test_a_scored_completion_that_cannot_be_trained_on_is_refused(changes: dict[str, Any], sentence: str) -> None:
    messages.from_scored_completion(messages.to_scored_completion(scored()))
    with pytest.raises(RequestError, match=sentence):
        messages.from_scored_completion(messages.to_scored_completion(scored(**changes)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.ClearField("logprobs"), "logprobs: a tensor is required"),
        (lambda m: setattr(m, "finish_reason", 0), "finish_reason: 0 is none of"),
        (lambda m: setattr(m, "finish_reason", 99), "finish_reason: 99 is none of"),
        (lambda m: setattr(m.response_mask, "dtype", 1), "response_mask: dtype"),
    ],
)
def test_a_scored_completion_of_another_writer_is_refused(change: Callable[[Any], None], sentence: str) -> None:
    message = messages.to_scored_completion(scored())
    change(message)
    with pytest.raises(RequestError, match=sentence):
        messages.from_scored_completion(message)


def completion_message() -> policy_pb2.Completion:
    return messages.to_completion(
        Completion(
            0, 0, np.array([5, 6], np.int32), f32(-1, -2), LogprobMode.RAW, "x", FinishReason.EOS, "",
            (VersionSpan(version(1), 0, 2),), 1,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.ClearField("logprobs"), "completion.logprobs: a tensor is required"),
        (lambda m: m.logprobs.CopyFrom(messages.to_tensor(f32(-1))), "1 for 2 tokens"),
        (lambda m: m.logprobs.CopyFrom(messages.to_tensor(f32(-1, np.nan))), "not finite"),
        (lambda m: setattr(m, "logprob_mode", 0), "logprob_mode: 0 is none of"),
        (lambda m: setattr(m, "finish_reason", 0), "finish_reason: 0 is none of"),
        (lambda m: m.ClearField("versions"), "cover 0 of 2"),
    ],
)
def test_a_completion_that_is_incomplete_is_refused(change: Callable[[Any], None], sentence: str) -> None:
    message = completion_message()
    messages.from_completion(message)
    change(message)
    with pytest.raises(RequestError, match=sentence):
        messages.from_completion(message)


def test_half_precision_and_wide_ids_are_taken_as_the_record_has_them() -> None:
    message = completion_message()
    message.logprobs.CopyFrom(messages.to_tensor(np.array([-1, -2], np.float16)))
    message.token_ids.CopyFrom(messages.to_tensor(np.array([5, 6], np.int64)))
    back = messages.from_completion(message)
    assert back.logprobs is not None
    assert (back.logprobs.dtype, back.token_ids.dtype) == (np.float32, np.int32)
    message.token_ids.CopyFrom(messages.to_tensor(np.array([5, 2**31], np.int64)))
    with pytest.raises(RequestError, match="token ids from 5 to 2147483648"):
        messages.from_completion(message)


def test_empty_messages_are_refused() -> None:
    """What an empty payload decodes to."""
    with pytest.raises(RequestError, match="rollout_id: empty"):
        messages.from_rollout(rollout_pb2.Rollout())
    with pytest.raises(RequestError, match="no completion"):
        messages.from_rollout(rollout_pb2.Rollout(rollout_id="r/0/0"))
    with pytest.raises(RequestError, match="rollout_id: empty"):
        messages.from_prompt_task(rollout_pb2.PromptTask())
    with pytest.raises(RequestError, match="max_new_tokens"):
        messages.from_prompt_task(rollout_pb2.PromptTask(rollout_id="r/0/0"))


def test_versions_are_ordered_inside_a_run() -> None:
    assert WeightVersion("r", 0, 9, "") < WeightVersion("r", 1, 2, "") < WeightVersion("r", 1, 3, "")
    with pytest.raises(ValueError, match="different runs"):
        _ = WeightVersion("r", 0, 1, "") < WeightVersion("s", 0, 2, "")
    assert str(WeightVersion("r", 1, 3, "0123456789")) == "r/1-3/01234567"


def test_a_rollout_lists_its_versions_oldest_first() -> None:
    rollout = Rollout("r/0/0", "r", 0, 0, "", {}, (scored(), scored()), Sampling(), "", "", "w", 0.0)
    assert rollout.versions == (version(1), version(2))
