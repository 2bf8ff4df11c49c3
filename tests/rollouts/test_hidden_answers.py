"""The reference's hidden states as the worker takes them: what it asks for, what it refuses, where they end up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from rlhf.errors import RequestError, RlhfError
from rlhf.rollouts.assemble import assemble
from rlhf.rollouts.services import Generated, References, Scores, Services
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.serving.server import Server, running
from rlhf.settings import Listen
from rlhf.v1 import reference_pb2, reference_pb2_grpc, rollout_pb2
from rlhf.wire.messages import from_rollout, to_rollout
from rlhf.wire.records import (
    Blob,
    Completion,
    FinishReason,
    HiddenStates,
    LogprobMode,
    PromptTask,
    Sampling,
    Stopping,
    VersionSpan,
    WeightVersion,
)
from rlhf.wire.tensors import to_hidden_states, to_ragged

SERVICE = "rlhf.v1.ReferenceService"
LENGTHS = (2, 3, 1)
"""Tokens of the completions, of which the first task has two and the second one."""
STATES = tuple(
    HiddenStates("bfloat16", (length, 4), bytes([index]) * length * 8)
    if index != 1
    else HiddenStates("bfloat16", (length, 4), Blob("file:///blobs/x", length * 8, "ab" * 32))
    for index, length in enumerate(LENGTHS)
)


@dataclass
class Reference(reference_pb2_grpc.ReferenceServiceServicer):
    """Answers what a test gives it."""

    answer: reference_pb2.LogProbsResponse
    requests: list[reference_pb2.LogProbsRequest] = field(default_factory=list)

    async def LogProbs(self, request: Any, context: Any) -> reference_pb2.LogProbsResponse:
        self.requests.append(request)
        return self.answer


def task(index: int, **changes: Any) -> PromptTask:
    return PromptTask(
        f"run/{index}/0", "run", index, 0, np.array([1, 2], np.int32), "", {}, Sampling(temperature=0.5),
        Stopping(max_new_tokens=8), None, "cd" * 32, **changes,
    )  # fmt: skip


def generated(*lengths: int) -> Generated:
    span = WeightVersion("run", 0, 0, "ab")
    completions = (
        Completion(
            0, 0, np.arange(length, dtype=np.int32), np.zeros(length, np.float32), LogprobMode.TEMPERATURE, "",
            FinishReason.EOS, "", (VersionSpan(span, 0, length),), 0,
        )
        for length in lengths
    )  # fmt: skip
    return Generated(tuple(completions), Sampling())


TASKS = [task(0, ref_hidden_states=True), task(1, ref_hidden_states=True)]
GENERATED = [generated(*LENGTHS[:2]), generated(LENGTHS[2])]


async def refer(reference: Reference, tasks: list[PromptTask] = TASKS) -> list[References]:
    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        server.register(reference_pb2_grpc.add_ReferenceServiceServicer_to_server, reference)
        await server.set_ready(SERVICE, True)
        yield

    async with (
        running("reference", Listen(grace_s=0.1), [SERVICE], start) as server,
        Services.connected(RolloutsSettings(reference=server.address)) as services,
    ):
        return await services.refer(tasks, GENERATED)


def answering(*states: HiddenStates) -> reference_pb2.LogProbsResponse:
    return reference_pb2.LogProbsResponse(
        hidden_states=[to_hidden_states(one) for one in states], model_sha256="reference"
    )


def test_hidden_states_are_asked_for_and_end_up_in_the_rollout() -> None:
    reference = Reference(answering(*STATES))
    references = asyncio.run(refer(reference))
    (request,) = reference.requests
    assert request.answer == reference_pb2.ANSWER_HIDDEN_STATES
    assert [one.answers for one in references] == [STATES[:2], STATES[2:]]
    scores = Scores(np.zeros(2, np.float32), np.zeros((2, 1), np.float32), "reward")
    made = assemble(TASKS[0], GENERATED[0], scores, references[0], "worker-0")
    arrived = from_rollout(rollout_pb2.Rollout.FromString(to_rollout(made).SerializeToString()))
    assert [one.ref_hidden for one in arrived.completions] == list(STATES[:2])
    assert [one.ref_logprobs for one in arrived.completions] == [None, None]
    assert arrived.reference_sha256 == "reference"


def test_log_probs_are_asked_for_where_the_tasks_say_nothing() -> None:
    rows = [np.full(length, -1, np.float32) for length in LENGTHS]
    reference = Reference(reference_pb2.LogProbsResponse(logprobs=to_ragged(rows, np.float32)))
    first, second = asyncio.run(refer(reference, [task(0), task(1)]))
    assert reference.requests[0].answer == reference_pb2.ANSWER_LOGPROBS
    np.testing.assert_equal([*first.answers, *second.answers], rows)


def states(index: int, **changes: Any) -> list[HiddenStates]:
    """The right answer, with another one in place of one."""
    fields: dict[str, Any] = {"dtype": "bfloat16", "shape": (LENGTHS[index], 4), "content": bytes(LENGTHS[index] * 8)}
    other = HiddenStates(**{**fields, **changes})
    return [*STATES[:index], other, *STATES[index + 1 :]]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (answering(), RlhfError, r"hidden states of lengths \[\] for tokens of \[2, 3, 1\] to run/0/0 and 1 more"),
        (answering(*STATES[:2]), RlhfError, r"lengths \[2, 3\] for tokens of \[2, 3, 1\]"),
        (answering(*STATES[::-1]), RlhfError, r"lengths \[1, 3, 2\] for"),
        (answering(*states(2, shape=(2, 4), content=bytes(16))), RlhfError, r"lengths \[2, 3, 2\] for"),
        (answering(*states(2, shape=(1, 5), content=bytes(10))), RlhfError, r"several widths or dtypes"),
        (answering(*states(2, dtype="float16")), RlhfError, r"several widths or dtypes"),
        (answering(*states(0, content=bytes(15))), RequestError, "takes 16 bytes, 15 received"),
        (answering(*states(0, content=b"\xff" * 16)), RequestError, "hidden_states: not finite"),
    ],
)
def test_hidden_states_that_do_not_fit_the_tokens(
    answer: reference_pb2.LogProbsResponse, error: type[RlhfError], says: str
) -> None:
    with pytest.raises(error, match=says):
        asyncio.run(refer(Reference(answer)))


def test_a_service_that_answers_log_probs_instead() -> None:
    """As one does that knows of nothing else."""
    rows = [np.zeros(length, np.float32) for length in LENGTHS]
    answer = reference_pb2.LogProbsResponse(logprobs=to_ragged(rows, np.float32))
    with pytest.raises(RlhfError, match=r"the reference service answered hidden states of lengths \[\]"):
        asyncio.run(refer(Reference(answer)))
