"""The worker between a real Redis and three servers on loopback that do as a test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import redis

from rlhf import errors
from rlhf.queues.connection import open_client
from rlhf.queues.registry import Registry, open_registry
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Delivery, Queue, prompts_queue, rollouts_queue
from rlhf.rollouts.services import Services
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.rollouts.worker import Worker
from rlhf.serving.server import Server, running
from rlhf.settings import Listen
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from rlhf.v1 import (
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    rollout_pb2,
)
from rlhf.wire.messages import from_rollout, from_sampling, to_completion, to_prompt_task, to_sampling, to_version
from rlhf.wire.records import (
    Completion,
    FinishReason,
    LogprobMode,
    PromptTask,
    Rollout,
    Sampling,
    Stopping,
    VersionSpan,
    WeightVersion,
)
from rlhf.wire.tensors import from_ragged, from_tensor, to_ragged, to_tensor

VERSION = WeightVersion("run", 1, 2, "ab" * 32)
COMPLETIONS = 3


def completion(index: int, **changes: Any) -> Completion:
    length = index + 1
    values: dict[str, Any] = {
        "prompt_index": 0,
        "completion_index": index,
        "token_ids": np.arange(10, 10 + length, dtype=np.int32),
        "logprobs": np.linspace(-1, -0.5, length, dtype=np.float32),
        "logprob_mode": LogprobMode.TEMPERATURE,
        "text": f"completion {index}",
        "finish_reason": FinishReason.EOS,
        "stopped_by": "",
        "versions": (VersionSpan(VERSION, 0, length),),
        "seed": 7 + index,
    }
    return Completion(**{**values, **changes})


@dataclass
class Backends(
    policy_pb2_grpc.PolicyServiceServicer,
    reward_pb2_grpc.RewardServiceServicer,
    reference_pb2_grpc.ReferenceServiceServicer,
):
    """All three services. A test replaces what it wants to see fail."""

    before: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    """Awaited at the start of a call to the method."""
    completions: Callable[[], list[Completion]] = lambda: [completion(index) for index in range(COMPLETIONS)]
    score: Callable[[np.ndarray], np.ndarray] = lambda lengths: lengths.astype(np.float32)
    requests: dict[str, list[Any]] = field(default_factory=lambda: {"Generate": [], "Score": [], "LogProbs": []})

    async def _enter(self, method: str, request: Any) -> None:
        self.requests[method].append(request)
        if method in self.before:
            await self.before[method]()

    async def Generate(self, request: Any, context: Any) -> policy_pb2.GenerateResponse:
        await self._enter("Generate", request)
        return policy_pb2.GenerateResponse(
            request_id=request.request_id,
            completions=[
                to_completion(replace(one, prompt_index=index, seed=seed + one.completion_index))
                for index, seed in enumerate(request.seeds)
                for one in self.completions()
            ],
            sampling=request.sampling,
        )

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        await self._enter("Score", request)
        lengths = np.diff(from_tensor(request.tokens.token_ids.cu_seqlens, ""))
        scores = self.score(lengths)
        return reward_pb2.ScoreResponse(
            scores=to_tensor(scores), member_scores=to_tensor(scores.reshape(-1, 1)), model_sha256="reward"
        )

    async def LogProbs(self, request: Any, context: Any) -> reference_pb2.LogProbsResponse:
        await self._enter("LogProbs", request)
        sequences = from_ragged(request.token_ids, "")
        firsts = from_tensor(request.first_scored, "")
        rows = [-row[first:].astype(np.float32) for row, first in zip(sequences, firsts, strict=True)]
        return reference_pb2.LogProbsResponse(logprobs=to_ragged(rows, np.float32), model_sha256="reference")


KINDS = {
    "policy": ("rlhf.v1.PolicyService", policy_pb2_grpc.add_PolicyServiceServicer_to_server),
    "reward": ("rlhf.v1.RewardService", reward_pb2_grpc.add_RewardServiceServicer_to_server),
    "reference": ("rlhf.v1.ReferenceService", reference_pb2_grpc.add_ReferenceServiceServicer_to_server),
}


def serving(kind: str, backends: Backends, port: int = 0) -> Any:
    service, add_to_server = KINDS[kind]

    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        server.register(add_to_server, backends)
        await server.set_ready(service, True)
        yield

    return running(kind, Listen(port=port, grace_s=0.1), [service], start)


@dataclass
class Run:
    """A run's queues, and how its workers are set."""

    name: str
    redis: RedisSettings
    client: redis.Redis
    prompts: Queue
    rollouts: Queue
    registry: Registry

    def add(self, index: int = 0, **changes: Any) -> PromptTask:
        task = prompt_task(self.name, index, **changes)
        self.prompts.enqueue(task.rollout_id, to_prompt_task(task).SerializeToString())
        return task

    def settings(self, addresses: dict[str, str], **changes: Any) -> Settings:
        rollouts = RolloutsSettings(**{"score_timeout_s": 10, "generate_timeout_s": 10, **addresses, **changes})
        return Settings(run=RunSettings(name=self.name), redis=self.redis, rollouts=rollouts)

    @asynccontextmanager
    async def working(self, backends: Backends, **changes: Any) -> AsyncIterator[Worker]:
        """A worker at work beside three servers, stopped at the end."""
        async with AsyncExitStack() as stack:
            servers = {kind: await stack.enter_async_context(serving(kind, backends)) for kind in KINDS}
            settings = self.settings({kind: server.address for kind, server in servers.items()}, **changes)
            yield await stack.enter_async_context(self.at_work(settings))

    @asynccontextmanager
    async def at_work(self, settings: Settings) -> AsyncIterator[Worker]:
        async with Services.connected(settings.rollouts) as services:
            worker = Worker(settings, services, self.prompts, self.rollouts, self.registry)
            task = asyncio.create_task(worker.work())
            try:
                yield worker
            finally:
                worker.stopped.set()
                await task

    async def take(self, count: int, timeout_s: float = 10) -> list[Delivery]:
        """As the trainer: takes rollouts, acknowledged."""
        taken: list[Delivery] = []
        async with asyncio.timeout(timeout_s):
            while len(taken) < count:
                found = await asyncio.to_thread(self.rollouts.consume, "trainer", count, 0.2)
                self.rollouts.acknowledge(found)
                taken += found
        return taken


def prompt_task(run: str, index: int, **changes: Any) -> PromptTask:
    values: dict[str, Any] = {
        "rollout_id": f"{run}/{index}/0",
        "run_id": run,
        "prompt_index": index,
        "attempt": 0,
        "token_ids": np.array([1, 2, 3, 4], dtype=np.int32),
        "text": "a prompt",
        "metadata": {"answer": "42"},
        "sampling": Sampling(temperature=0.5, seed=7, completions=COMPLETIONS),
        "stopping": Stopping(max_new_tokens=8),
        "at_least": VERSION,
        "tokenizer_sha256": "cd" * 32,
    }
    return PromptTask(**{**values, **changes})


@pytest.fixture
def run(redis_settings: RedisSettings, run_name: str) -> Iterator[Run]:
    with opened(redis_settings, run_name) as opened_run:
        yield opened_run


@contextmanager
def opened(settings: RedisSettings, name: str) -> Iterator[Run]:
    client = open_client(settings.url, settings)
    prompts, rollouts = prompts_queue(client, name, settings), rollouts_queue(client, name, settings)
    yield Run(name, settings, client, prompts, rollouts, open_registry(client, name, settings))
    client.close()


def rollout(delivery: Delivery) -> Rollout:
    return from_rollout(rollout_pb2.Rollout.FromString(delivery.payload))


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for lies in Redis
            await asyncio.sleep(0.02)


def settled(run: Run) -> bool:
    """No prompt is left, and none was lost."""
    depth = run.prompts.depth()
    return depth.entries == 0 and depth.counts.lost == 0


def test_a_prompt_becomes_a_rollout(run: Run) -> None:
    backends = Backends()
    task = run.add()

    async def scenario() -> Rollout:
        async with run.working(backends, consumer="worker-7"):
            (delivery,) = await run.take(1)
            await until(lambda: settled(run))
            assert delivery.item_id == task.rollout_id
            return rollout(delivery)

    made = asyncio.run(scenario())
    assert (made.rollout_id, made.run_id, made.prompt_index, made.attempt) == (task.rollout_id, run.name, 0, 0)
    assert (made.prompt, made.metadata, made.worker) == ("a prompt", {"answer": "42"}, "worker-7")
    assert (made.reward_sha256, made.reference_sha256) == ("reward", "reference")
    assert made.sampling == from_sampling(to_sampling(task.sampling))
    assert made.versions == (VERSION,)
    for index, scored in enumerate(made.completions):
        response = np.arange(10, 11 + index)
        assert scored.token_ids.tolist() == [1, 2, 3, 4, *response]
        assert scored.response_mask.tolist() == [False] * 4 + [True] * len(response)
        np.testing.assert_array_equal(scored.logprobs[4:], completion(index).logprobs)
        np.testing.assert_array_equal(scored.ref_logprobs[4:], -response.astype(np.float32))
        assert np.isnan(scored.logprobs[:4]).all()
        assert np.isnan(scored.ref_logprobs[:4]).all()
        assert (scored.score, scored.member_scores.tolist()) == (5.0 + index, [5.0 + index])
        assert (scored.seed, scored.text, scored.finish_reason) == (7 + index, f"completion {index}", FinishReason.EOS)


def test_what_the_services_are_asked(run: Run) -> None:
    backends = Backends()
    task = run.add()

    async def scenario() -> None:
        async with run.working(backends):
            await run.take(1)

    asyncio.run(scenario())
    (generate,), (score,), (refer,) = (backends.requests[name] for name in ("Generate", "Score", "LogProbs"))
    assert generate.request_id.startswith(task.rollout_id)
    assert generate.weights.at_least == to_version(VERSION)
    assert generate.logprob_mode == policy_pb2.LOGPROB_MODE_TEMPERATURE
    assert (list(generate.seeds), generate.sampling.HasField("seed")) == ([7], False)
    assert generate.stopping.max_new_tokens == 8
    assert [item.completion for item in score.decoded.items] == [f"completion {index}" for index in range(COMPLETIONS)]
    assert [dict(entry.fields) for entry in score.metadata] == [{"answer": "42"}] * COMPLETIONS
    assert from_tensor(score.tokens.prompt_lengths, "").tolist() == [4] * COMPLETIONS
    assert from_tensor(refer.first_scored, "").tolist() == [4] * COMPLETIONS
    assert refer.temperature == 0.5
    for request in (generate, score.tokens, refer):
        assert request.tokenizer_sha256 == task.tokenizer_sha256


def test_scoring_and_reference_run_at_the_same_time(run: Run) -> None:
    async def scenario() -> None:
        barrier = asyncio.Barrier(2)

        async def meet() -> None:
            await asyncio.wait_for(barrier.wait(), 5)

        async with run.working(Backends(before={"Score": meet, "LogProbs": meet})):
            await run.take(1)

    run.add()
    asyncio.run(scenario())


def test_prompts_that_are_there_together_share_their_calls(run: Run) -> None:
    tasks = {
        f"{run.name}/{index}/0": run.add(
            index,
            token_ids=np.arange(1, 3 + index, dtype=np.int32),
            text=f"prompt {index}",
            metadata={"answer": str(index)},
            sampling=Sampling(temperature=0.5, seed=100 * index, completions=COMPLETIONS),
        )
        for index in range(5)
    }
    backends = Backends()

    async def scenario() -> list[Rollout]:
        async with run.working(backends, prompts_per_call=3) as worker:
            made = [rollout(delivery) for delivery in await run.take(5)]
            await until(lambda: settled(run))
            assert worker.counts == {"rollouts": 5}
            return made

    made = asyncio.run(scenario())
    assert {one.rollout_id for one in made} == tasks.keys()
    for one in made:
        task = tasks[one.rollout_id]
        length = len(task.token_ids)
        assert (one.prompt, one.metadata, one.sampling) == (task.text, task.metadata, task.sampling)
        assert one.prompt_index == task.prompt_index
        for index, scored in enumerate(one.completions):
            assert scored.token_ids.tolist() == [*task.token_ids, *range(10, 11 + index)]
            assert scored.ref_logprobs[length:].tolist() == [-float(token) for token in range(10, 11 + index)]
            assert (scored.seed, scored.score) == (100 * one.prompt_index + index, length + index + 1)
    assert {name: len(requests) for name, requests in backends.requests.items()} == dict.fromkeys(backends.requests, 2)
    scored_items = {
        (item.prompt, entry.fields["answer"])
        for request in backends.requests["Score"]
        for item, entry in zip(request.decoded.items, request.metadata, strict=True)
    }
    assert scored_items == {(task.text, task.metadata["answer"]) for task in tasks.values()}


def test_tasks_of_different_sampling_get_calls_of_their_own(run: Run) -> None:
    for index, temperature in enumerate((0.5, 1.0, 0.5, 1.0)):
        run.add(index, sampling=Sampling(temperature=temperature, seed=index, completions=COMPLETIONS))
    backends = Backends()

    async def scenario() -> None:
        async with run.working(backends):
            await run.take(4)

    asyncio.run(scenario())
    asked = sorted((one.sampling.temperature, sorted(one.seeds)) for one in backends.requests["Generate"])
    assert asked == [(0.5, [0, 2]), (1.0, [1, 3])]


@pytest.mark.parametrize("prompts_per_call", [1, 3])
def test_prompts_are_worked_on_together_up_to_the_limit(run: Run, prompts_per_call: int) -> None:
    for index in range(12):
        run.add(index)
    running_now, most, largest = 0, 0, 0
    backends = Backends()

    async def count() -> None:
        nonlocal running_now, most, largest
        mine = len(backends.requests["Generate"][-1].prompts)
        running_now += mine
        most, largest = max(most, running_now), max(largest, mine)
        await asyncio.sleep(0.1)
        running_now -= mine

    backends.before["Generate"] = count

    async def scenario() -> None:
        async with run.working(backends, prompts_in_flight=4, prompts_per_call=prompts_per_call):
            ids = {delivery.item_id for delivery in await run.take(12)}
            assert len(ids) == 12
            await until(lambda: settled(run))

    asyncio.run(scenario())
    assert most == 4
    assert 1 <= largest <= prompts_per_call


@pytest.mark.parametrize("method", ["Generate", "Score", "LogProbs"])
@pytest.mark.parametrize(
    "error",
    [
        errors.Unavailable("restarting"),
        errors.Overloaded("full", retry_after_s=0.01),
        errors.WeightsMismatch("older"),
        errors.DeadlineExceeded("slow"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_pass_is_tried_again(run: Run, method: str, error: errors.RlhfError) -> None:
    failures = iter([error] * 2)

    async def fail_at_first() -> None:
        for failure in failures:
            raise failure

    async def scenario() -> None:
        backends = Backends(before={method: fail_at_first})
        async with run.working(backends) as worker:
            await run.take(1)
            await until(lambda: settled(run))
        assert len(backends.requests[method]) == 3
        assert worker.counts == {"rollouts": 1}

    run.add()
    asyncio.run(scenario())


def test_a_group_is_asked_again_as_it_was(run: Run) -> None:
    for index in range(3):
        run.add(index)
    failures = iter([errors.Unavailable("restarting")] * 2)

    async def fail_at_first() -> None:
        for failure in failures:
            raise failure

    async def scenario() -> None:
        backends = Backends(before={"Generate": fail_at_first})
        async with run.working(backends) as worker:
            await run.take(3)
            await until(lambda: settled(run))
            assert worker.counts == {"rollouts": 3}
        first, second, third = backends.requests["Generate"]
        assert len(first.prompts) == 3
        assert first == second == third

    asyncio.run(scenario())


BAD_TOKEN = 99


def has_bad_token(request: Any) -> bool:
    if isinstance(request, policy_pb2.GenerateRequest):
        return any(BAD_TOKEN in from_tensor(prompt.token_ids, "") for prompt in request.prompts)
    tokens = request.tokens.token_ids if isinstance(request, reward_pb2.ScoreRequest) else request.token_ids
    return BAD_TOKEN in from_tensor(tokens.values, "")


@pytest.mark.parametrize("method", ["Generate", "Score", "LogProbs"])
def test_one_bad_prompt_does_not_take_the_others_with_it(run: Run, method: str) -> None:
    tasks = [run.add(index, token_ids=np.array([1, BAD_TOKEN if index == 2 else 3], np.int32)) for index in range(4)]
    backends = Backends()

    async def refuse_it() -> None:
        if has_bad_token(backends.requests[method][-1]):
            raise errors.RequestError("token 99 is outside the vocabulary")

    backends.before[method] = refuse_it

    async def scenario() -> None:
        async with run.working(backends) as worker:
            arrived = {delivery.item_id for delivery in await run.take(3)}
            assert arrived == {task.rollout_id for task in tasks if task.prompt_index != 2}
            await until(lambda: settled(run) and worker.counts["dead"] == 1)
            assert worker.counts == {"rollouts": 3, "failures": 2, "dead": 1}

    asyncio.run(scenario())
    (letter,) = run.prompts.dead_letters()
    assert letter.item_id == tasks[2].rollout_id
    assert "outside the vocabulary" in letter.reason
    assert [len(one.prompts) for one in backends.requests["Generate"]] == [4, 1, 1, 1, 1, 1, 1]


def test_a_prompt_waits_for_a_service_that_is_away(run: Run) -> None:
    run.add()

    async def scenario() -> None:
        backends = Backends()
        async with serving("policy", backends) as policy, serving("reference", backends) as reference:
            async with serving("reward", backends) as reward:
                addresses = {"policy": policy.address, "reference": reference.address, "reward": reward.address}
            async with run.at_work(run.settings(addresses)) as worker:
                await until(lambda: len(backends.requests["LogProbs"]) == 1)
                await asyncio.sleep(0.5)
                assert run.prompts.depth().pending == 1
                async with serving("reward", backends, port=reward.port):
                    await run.take(1)
                assert worker.counts["failures"] == 0
        assert len(backends.requests["Generate"]) == 1

    asyncio.run(scenario())


def test_a_service_that_stays_away_is_a_failure(run: Run) -> None:
    run.add()

    async def gone() -> None:
        raise errors.DeadlineExceeded("slow")

    async def scenario() -> None:
        async with run.working(Backends(before={"Score": gone}), unavailable_timeout_s=0.2) as worker:
            await until(lambda: worker.counts["dead"] == 1)
            assert worker.counts == {"failures": 2, "dead": 1}

    asyncio.run(scenario())


def test_a_service_that_stays_away_is_nobody_s_fault(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """No prompt of a group is tried alone for as long again."""
    caplog.set_level("INFO")
    for index in range(2):
        run.add(index)

    async def gone() -> None:
        raise errors.DeadlineExceeded("slow")

    async def scenario() -> None:
        async with run.working(Backends(before={"Score": gone}), unavailable_timeout_s=0.2) as worker:
            await until(lambda: worker.counts["dead"] == 2)
            assert worker.counts == {"failures": 4, "dead": 2}

    asyncio.run(scenario())
    assert "one by one" not in caplog.text


def test_three_failures_are_a_dead_letter_with_the_reason(run: Run) -> None:
    task = run.add()

    async def broken() -> None:
        raise errors.RuleError("the rule raised ValueError: no rule for this")

    async def scenario() -> None:
        backends = Backends(before={"Score": broken})
        async with run.working(backends):
            await until(lambda: run.prompts.counts().dead == 1)
        assert len(backends.requests["Score"]) == 3

    asyncio.run(scenario())
    (letter,) = run.prompts.dead_letters()
    assert letter.item_id == task.rollout_id
    assert "no rule for this" in letter.reason
    assert settled(run)


@pytest.mark.parametrize("payload", [b"\xff\xff no protobuf", b""])
def test_an_entry_that_is_no_task_is_a_dead_letter_at_once(run: Run, payload: bytes) -> None:
    run.prompts.enqueue("garbage", payload)
    run.add()

    async def scenario() -> None:
        async with run.working(Backends()) as worker:
            await run.take(1)
            await until(lambda: run.prompts.counts().dead == 1)
            assert worker.counts["failures"] == 0

    asyncio.run(scenario())
    assert "PromptTask" in run.prompts.dead_letters()[0].reason


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logprobs": None, "logprob_mode": LogprobMode.NONE}, "log-probs of mode NONE"),
        ({"logprob_mode": LogprobMode.RAW}, "log-probs of mode RAW"),
        ({"logprobs": np.array([np.nan], np.float32)}, "not finite"),
        ({"logprobs": np.zeros(0, np.float32)}, "0 for 1 tokens"),
        ({"token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "versions": ()}, "without tokens"),
        ({"versions": ()}, "cover 0 of 1"),
        ({"versions": (VersionSpan(VERSION, 0, 2),)}, "cover 2 of 1"),
        ({"completion_index": 1}, "out of order"),
    ],
)
def test_an_answer_of_the_policy_that_cannot_be_trained_on(run: Run, changes: dict[str, Any], says: str) -> None:
    run.add()
    backends = Backends(completions=lambda: [completion(0, **changes), *(completion(i) for i in (1, 2))])
    assert says in dead_letter_reason(run, backends)


def test_a_wrong_number_of_completions(run: Run) -> None:
    run.add()
    assert "2 completions" in dead_letter_reason(run, Backends(completions=lambda: [completion(0), completion(1)]))


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda lengths: np.full(len(lengths), np.nan, np.float32), "a score not finite"),
        (lambda lengths: np.zeros(2, np.float32), "2 scores"),
    ],
)
def test_scores_that_cannot_be_trained_on(run: Run, score: Callable[[np.ndarray], np.ndarray], says: str) -> None:
    run.add()
    assert says in dead_letter_reason(run, Backends(score=score))


def dead_letter_reason(run: Run, backends: Backends) -> str:
    async def scenario() -> None:
        async with run.working(backends):
            await until(lambda: run.prompts.counts().dead == 1)

    asyncio.run(scenario())
    assert run.rollouts.depth().entries == 0
    return run.prompts.dead_letters()[0].reason


def test_a_full_rollouts_stream_makes_the_worker_wait(redis_settings: RedisSettings, run_name: str) -> None:
    with opened(redis_settings.model_copy(update={"max_entries": 2}), run_name) as run:
        producer = prompts_queue(run.client, run_name, redis_settings)
        for index in range(5):
            task = prompt_task(run_name, index)
            producer.enqueue(task.rollout_id, to_prompt_task(task).SerializeToString())

        async def scenario() -> None:
            async with run.working(Backends()):
                await until(lambda: run.rollouts.depth().entries == 2)
                await asyncio.sleep(0.5)
                assert run.prompts.depth().entries == 3
                assert len(await run.take(5)) == 5
                await until(lambda: settled(run))

        asyncio.run(scenario())


def test_a_rollout_too_large_for_the_stream_is_a_dead_letter(redis_settings: RedisSettings, run_name: str) -> None:
    with opened(redis_settings.model_copy(update={"max_mib": 1}), run_name) as run:
        producer = prompts_queue(run.client, run_name, redis_settings)
        for index, size in enumerate((1, 2**20, 1)):
            task = prompt_task(run_name, index, metadata={"answer": "4" * size})
            producer.enqueue(task.rollout_id, to_prompt_task(task).SerializeToString())

        async def scenario() -> None:
            async with run.working(Backends()):
                arrived = {delivery.item_id for delivery in await run.take(2)}
                assert arrived == {f"{run_name}/0/0", f"{run_name}/2/0"}
                await until(lambda: settled(run) and run.prompts.counts().dead == 1)

        asyncio.run(scenario())
        assert "could never be queued" in run.prompts.dead_letters()[0].reason


def test_a_stream_that_stays_full_ends_the_worker_and_keeps_the_prompt(
    redis_settings: RedisSettings, run_name: str
) -> None:
    with opened(redis_settings.model_copy(update={"max_entries": 1}), run_name) as run:
        run.rollouts.enqueue("other", b"in the way")
        run.add()

        async def scenario() -> None:
            async with run.working(Backends(), full_timeout_s=0.3):
                await asyncio.sleep(2)

        with pytest.raises(errors.Overloaded, match=r"full for 0\.3 s"):
            asyncio.run(scenario())
        assert run.prompts.depth().pending == 1


def test_a_rollout_that_is_queued_already_is_not_queued_twice(run: Run) -> None:
    task = run.add()
    run.rollouts.enqueue(task.rollout_id, b"from a worker that was killed before it acknowledged")

    async def scenario() -> None:
        async with run.working(Backends()) as worker:
            await until(lambda: settled(run))
            assert worker.counts == {"duplicates": 1}

    asyncio.run(scenario())
    assert run.rollouts.depth().entries == 1


def test_prompts_in_hand_are_renewed(run: Run) -> None:
    """`reclaim_idle_s` is 0.3 s here, and one call takes 1.5 s: without renewal the other worker would take it."""
    run.add()

    async def slow() -> None:
        await asyncio.sleep(1.5)

    async def scenario() -> None:
        backends = Backends(before={"Generate": slow})
        async with run.working(backends, consumer="one"):
            await until(lambda: len(backends.requests["Generate"]) == 1)
            other_queue = prompts_queue(run.client, run.name, run.redis)
            assert await asyncio.to_thread(other_queue.consume, "two", 1, 1.2) == []
            await run.take(1)
        assert len(backends.requests["Generate"]) == 1

    asyncio.run(scenario())


def test_a_prompt_that_was_taken_away_is_dropped(run: Run) -> None:
    run.add()
    cancelled = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def scenario() -> None:
        backends = Backends(before={"Generate": endless})
        async with run.working(backends):
            await until(lambda: len(backends.requests["Generate"]) == 1)
            (entry,) = run.client.xpending_range(run.prompts.keys.stream, "workers", "-", "+", 1)
            run.client.xclaim(run.prompts.keys.stream, "workers", "another", 0, [entry["message_id"]])
            await asyncio.wait_for(cancelled.wait(), 5)

    asyncio.run(scenario())


def test_a_prompt_that_was_taken_away_leaves_its_group(run: Run) -> None:
    tasks = [run.add(index) for index in range(3)]
    go_on = asyncio.Event()

    def in_hand() -> list[Any]:
        return [beat.fields["in_hand"] for beat in run.registry.beats() if beat.service == "rollouts"]

    async def scenario() -> None:
        backends = Backends()
        backends.before["Generate"] = lambda: asyncio.wait_for(go_on.wait(), 10)
        async with run.working(backends):
            await until(lambda: len(backends.requests["Generate"]) == 1)
            lost = run.client.xpending_range(run.prompts.keys.stream, "workers", "-", "+", 3)[1]
            run.prompts.acknowledge([Delivery(lost["message_id"].decode(), "", b"", False, "another", {})])
            await until(lambda: in_hand() == [2])
            go_on.set()
            arrived = {delivery.item_id for delivery in await run.take(2)}
            assert arrived == {tasks[0].rollout_id, tasks[2].rollout_id}
            await until(lambda: in_hand() == [0])
            assert settled(run)
            assert run.rollouts.depth().entries == 0
            assert len(backends.requests["Generate"]) == 1

    asyncio.run(scenario())


def test_stopping_does_not_wait_for_prompts_of_a_group_that_is_taken_apart(run: Run) -> None:
    for index in range(2):
        run.add(index)
    backends = Backends()
    alone = 0

    async def refuse_together_and_hang_alone() -> None:
        nonlocal alone
        if len(backends.requests["Generate"][-1].prompts) > 1:
            await asyncio.sleep(0.3)
            raise errors.RequestError("one of these cannot be answered")
        alone += 1
        await asyncio.sleep(30)

    backends.before["Generate"] = refuse_together_and_hang_alone

    async def scenario() -> None:
        async with asyncio.timeout(8):
            async with run.working(backends, grace_s=1):
                await until(lambda: len(backends.requests["Generate"]) == 1)
        assert alone == 2
        assert run.prompts.depth().pending == 2

    asyncio.run(scenario())


def test_stopping_finishes_what_it_can_and_leaves_the_rest_pending(run: Run) -> None:
    for index in range(2):
        run.add(index)
    calls = 0

    async def second_hangs() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.5 if calls == 1 else 30)

    async def scenario() -> None:
        backends = Backends(before={"Generate": second_hangs})
        async with run.working(backends, grace_s=1.5, prompts_per_call=1):
            await until(lambda: calls == 2)
        assert run.rollouts.depth().entries == 1
        assert run.prompts.depth().pending == 1
        again = Backends()
        run.prompts = prompts_queue(run.client, run.name, run.redis)
        async with run.working(again):
            await run.take(2)
            await until(lambda: settled(run))
        assert [len(one.prompts) for one in again.requests["Generate"]] == [1]

    asyncio.run(scenario())


def test_it_says_what_it_does(run: Run) -> None:
    run.add()

    async def slow() -> None:
        await asyncio.sleep(1.5)

    def beats() -> list[dict[str, Any]]:
        return [dict(beat.fields) for beat in run.registry.beats() if beat.service == "rollouts"]

    async def scenario() -> None:
        async with run.working(Backends(before={"Generate": slow})):
            await until(lambda: beats() == [{"in_hand": 1, "stages": {"generating": 1}}])
            await until(lambda: beats() == [{"in_hand": 0, "stages": {}, "rollouts": 1}])

    asyncio.run(scenario())
