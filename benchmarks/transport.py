"""Which share of a PPO step of the demo do gRPC and Redis take?

1. A short PPO run of the demo gives the median seconds of a step, and its very messages: the tasks in the prompts
   stream and the rollouts in the rollouts stream.
2. Without models: these tasks go once more through everything that a rollout passes, a step's batch at a time: Redis, a
   `rlhf rollouts` process, and the three services in a process that answers the recorded completions at once
   (harness/null_services.py). What is measured is encoding, checking, gRPC, queues, and waking and switching between
   processes: seconds until the trainer's side has read and decoded the last of the batch's rollouts, and the seconds
   that each process computed. The share of this in (1) counts as if nothing of it happened while a model computes.
   Beside it stands the same without Redis (calls only), and without gRPC (streams only).
3. With models: the same tasks through Redis, worker and the real services, and the same work in this process, in turn.
   The difference is what the services add to a step, their overlap with the models' computing included.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import redis

from harness.bench import Figure, Measured, Options, expect_equal, expect_near, interleaved, main, scratch
from harness.demo import demo_settings, make_models, run_ppo
from harness.machine import cpu_s
from harness.null_services import NullModel, Recorded, null_services
from harness.one_process import OneProcess
from harness.servers import rollout_worker, service
from rlhf.models.folders import start_model
from rlhf.queues.connection import open_client
from rlhf.queues.keys import QueueKeys, RunKeys
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Delivery, Enqueued, Queue, prompts_queue, rollouts_queue
from rlhf.rollouts.services import Services
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.rollouts.worker import both
from rlhf.settings.run import Settings
from rlhf.supervisor.embedded_redis import EmbeddedRedis
from rlhf.v1 import rollout_pb2
from rlhf.wire.messages import from_prompt_task, from_rollout, to_prompt_task
from rlhf.wire.records import PromptTask, Rollout

T = TypeVar("T")

NULL_RUN, REAL_RUN = "null", "real"
THREADS = 1
TIMEOUT_S = 120.0
SKIPPED_STEPS = 2
"""At the start, while the messages are read out of Redis."""


@dataclass(frozen=True)
class Messages:
    """Of one batch, in the same order."""

    tasks: Sequence[PromptTask]
    """Of one completion each."""
    rollouts: Sequence[Rollout]
    rollout_bytes: Sequence[bytes]


@dataclass(frozen=True)
class Passed:
    """One batch on its way."""

    seconds: float
    cpu_s: dict[str, float]
    """By process."""
    tokens: int
    """Of prompts and responses."""


def measure(options: Options) -> Measured:
    make_models(options)
    settings = demo_settings(options, steps=options.size(14, 4))
    recorder = _Recorder(settings)
    metrics = run_ppo(settings, lambda _: recorder.look())
    steps_s = [sum(row[f"seconds_{part}"] for part in ("wait", "train", "publish")) for row in metrics[SKIPPED_STEPS:]]
    messages = recorder.messages()
    step_s = statistics.median(steps_s)
    passed = _pass_all(options, settings, messages)
    figures = [*_without_models(passed, step_s, len(messages.tasks)), *_with_models(passed, step_s)]
    waits_s = [row["seconds_wait"] for row in metrics[SKIPPED_STEPS:]]
    figures += [
        Figure("PPO step of the demo", "s", steps_s, headline=True),
        Figure("of which: waiting for rollouts", "s", waits_s),
    ]
    setup = {
        "batch_prompts": settings.ppo.batch_prompts,
        "prompts_in_flight": settings.rollouts.prompts_in_flight,
        "prompts_per_call": settings.rollouts.prompts_per_call,
        "steps": settings.ppo.steps,
        "rollout_bytes_median": statistics.median(map(len, messages.rollout_bytes)),
    }
    threads = {"policy": 1, "reward": 1, "reference": 1, "ppo": settings.ppo.threads}
    tokens = {way: batches[0].tokens for way, batches in passed.items()}
    expect_near("tokens", tokens["through the services"], tokens["in one process"])
    return Measured(figures, setup, threads, {"rollouts": len(messages.rollouts), "tokens": tokens})


class _Recorder:
    """Reads a batch of tasks and their rollouts out of a run's streams, as a bystander."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wanted = settings.ppo.batch_prompts
        self._client: redis.Redis | None = None
        self._tasks: dict[str, PromptTask] = {}
        self._rollouts: dict[str, bytes] = {}

    def look(self) -> None:
        address = self._settings.paths.redis / "address.json"
        if len(self._both()) >= self._wanted or not address.exists():
            return
        if self._client is None:
            self._client = open_client(json.loads(address.read_text())["url"], self._settings.redis)
        keys = RunKeys(self._settings.run.name)
        try:
            for item_id, payload in _entries(self._client, keys.prompts):
                self._tasks[item_id] = from_prompt_task(rollout_pb2.PromptTask.FromString(payload))
            self._rollouts |= dict(_entries(self._client, keys.rollouts))
        except redis.ConnectionError:
            return  # it starts, or has ended; `messages` says what is missing

    def messages(self) -> Messages:
        ids = self._both()[: self._wanted]
        expect_equal("recorded rollouts", found=len(ids), wanted=self._wanted)
        payloads = [self._rollouts[one] for one in ids]
        rollouts = [from_rollout(rollout_pb2.Rollout.FromString(payload)) for payload in payloads]
        return Messages([self._tasks[one] for one in ids], rollouts, payloads)

    def _both(self) -> list[str]:
        return sorted(self._tasks.keys() & self._rollouts.keys())


def _entries(client: redis.Redis, keys: QueueKeys) -> Iterator[tuple[str, bytes]]:
    entries: Any = client.xrange(keys.stream)
    for _, fields in entries:
        yield fields[b"id"].decode(), fields[b"p"]


def _pass_all(options: Options, settings: Settings, messages: Messages) -> dict[str, list[Passed]]:
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        server = EmbeddedRedis(folder / "redis")
        streams = RedisSettings(url=server.start())
        stack.callback(server.stop)
        assert server.pid is not None
        null = stack.enter_context(null_services(_null_model(messages)))
        worker_pid = stack.enter_context(_worker(NULL_RUN, null.addresses, streams, settings, folder))
        pids = {"worker": worker_pid, "services": null.pid, "redis": server.pid, "trainer": os.getpid()}
        path = _Path(streams, messages, pids, NULL_RUN, settings.rollouts.prompts_per_call)
        without_models = {
            "gRPC and Redis": path.whole,
            "gRPC alone": lambda: path.timed(lambda: asyncio.run(path.calls(null.addresses))),
            "Redis alone": lambda: path.timed(path.queues),
        }
        interleaved(without_models, 2)  # connections and first-time work
        found = interleaved(without_models, options.size(20, 2))
    return found | _with_real_services(options, settings, messages)


def _with_real_services(options: Options, settings: Settings, messages: Messages) -> dict[str, list[Passed]]:
    policy, reward = start_model(settings), settings.reward.model
    assert reward is not None
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        server = EmbeddedRedis(folder / "redis")
        streams = RedisSettings(url=server.start())
        stack.callback(server.stop)
        models = {"policy": policy, "reward": reward, "reference": policy}
        addresses = {}
        for verb, model in models.items():
            started = service(verb, {f"{verb}.model": model}, folder / f"{verb}.log", threads=THREADS)
            addresses[verb] = stack.enter_context(started).address
        stack.enter_context(_worker(REAL_RUN, addresses, streams, settings, folder))
        path = _Path(streams, messages, {}, REAL_RUN, settings.rollouts.prompts_per_call)
        alone = OneProcess(policy, reward, threads=THREADS, max_sequences=settings.policy.max_sequences)
        ways = {
            "through the services": path.whole,
            "in one process": lambda: path.timed(lambda: alone.roll_out(messages.tasks)),
        }
        interleaved(ways, 2)
        return interleaved(ways, options.size(10, 2))


def _worker(
    run: str, addresses: Mapping[str, str], streams: RedisSettings, settings: Settings, folder: Path
) -> AbstractContextManager[int]:
    own = {
        "run.name": run,
        "redis.url": streams.url,
        "rollouts.prompts_in_flight": settings.rollouts.prompts_in_flight,
        "rollouts.prompts_per_call": settings.rollouts.prompts_per_call,
        **{f"rollouts.{name}": address for name, address in addresses.items()},
    }
    return rollout_worker(own, folder / "worker.log")


class _Path:
    """What one batch passes."""

    def __init__(
        self, streams: RedisSettings, messages: Messages, pids: dict[str, int], run: str, prompts_per_call: int
    ) -> None:
        client = open_client(streams.url, streams)
        self._per_call = prompts_per_call
        self._messages = messages
        self._pids = pids
        self._prompts, self._rollouts = prompts_queue(client, run, streams), rollouts_queue(client, run, streams)
        self._own = prompts_queue(client, "own", streams), rollouts_queue(client, "own", streams)
        self._round = 0

    def whole(self) -> Passed:
        """Prompts stream, worker, services, rollouts stream."""
        return self.timed(self._send_and_receive)

    def timed(self, way: Callable[[], int]) -> Passed:
        self._round += 1
        before = {name: cpu_s(pid) for name, pid in self._pids.items()}
        began_s = time.perf_counter()
        tokens = way()
        seconds = time.perf_counter() - began_s
        return Passed(seconds, {name: cpu_s(pid) - before[name] for name, pid in self._pids.items()}, tokens)

    def _send_and_receive(self) -> int:
        for task in self._tasks():
            _add(self._prompts, task.rollout_id, to_prompt_task(task).SerializeToString())
        received = _receive(self._rollouts, len(self._messages.tasks))
        rollouts = [from_rollout(rollout_pb2.Rollout.FromString(delivery.payload)) for delivery in received]
        self._rollouts.acknowledge(received)
        return _tokens(rollouts)

    def queues(self) -> int:
        """Both streams, without the worker and the services between them."""
        prompts, rollouts = self._own
        tasks = self._tasks()
        for task in tasks:
            _add(prompts, task.rollout_id, to_prompt_task(task).SerializeToString())
        for deliveries in self._groups(_receive(prompts, len(tasks))):
            for delivery in deliveries:
                from_prompt_task(rollout_pb2.PromptTask.FromString(delivery.payload))
            prompts.acknowledge(deliveries)
        for task, payload in zip(tasks, self._messages.rollout_bytes, strict=True):
            _add(rollouts, task.rollout_id, payload)
        received = _receive(rollouts, len(tasks))
        decoded = [from_rollout(rollout_pb2.Rollout.FromString(delivery.payload)) for delivery in received]
        rollouts.acknowledge(received)
        return _tokens(decoded)

    async def calls(self, addresses: Mapping[str, str]) -> int:
        """The three calls of every group of tasks, all at once, as the worker makes them where all lie ready."""
        async with Services.connected(RolloutsSettings.model_validate(dict(addresses))) as services:

            async def one(tasks: Sequence[PromptTask]) -> int:
                generated = await services.generate(tasks)
                await both(services.score(tasks, generated), services.refer(tasks, generated))
                completions = [completion for answer in generated for completion in answer.completions]
                return sum(len(task.token_ids) for task in tasks) + sum(len(one.token_ids) for one in completions)

            return sum(await asyncio.gather(*map(one, self._groups(self._tasks()))))

    def _groups(self, items: Sequence[T]) -> list[Sequence[T]]:
        return [items[start : start + self._per_call] for start in range(0, len(items), self._per_call)]

    def _tasks(self) -> list[PromptTask]:
        """Under ids of their own in every round, or they would be taken for repetitions."""
        tasks = self._messages.tasks
        return [replace(task, rollout_id=f"{self._round}/{task.rollout_id}", at_least=None) for task in tasks]


def _add(queue: Queue, item_id: str, payload: bytes) -> None:
    answer = queue.enqueue(item_id, payload)
    assert answer is Enqueued.ADDED, answer


def _receive(queue: Queue, count: int) -> list[Delivery]:
    received: list[Delivery] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(received) < count:
        received += queue.consume("bench", 64, block_s=1.0)
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{len(received)} of {count} rollouts came")
    return received


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(completion.token_ids) for rollout in rollouts for completion in rollout.completions)


def _null_model(messages: Messages) -> NullModel:
    completions = [completion for rollout in messages.rollouts for completion in rollout.completions]
    answers = {
        one.seed: Recorded(
            one.token_ids[one.response_mask], one.logprobs[one.response_mask], one.text, one.finish_reason
        )
        for one in completions
    }
    largest = max(int(one.token_ids.max()) for one in completions)
    longest = max(len(one.token_ids) for one in completions)
    return NullModel(messages.tasks[0].tokenizer_sha256, largest + 1, longest + 1, answers)


def _without_models(passed: dict[str, list[Passed]], step_s: float, count: int) -> list[Figure]:
    whole = passed["gRPC and Redis"]

    def shares(way: str) -> list[float]:
        return [100 * one.seconds / step_s for one in passed[way]]

    computed = {process: [1000 * one.cpu_s[process] / count for one in whole] for process in whole[0].cpu_s}
    return [
        Figure("without models: a step's rollouts", "s", [one.seconds for one in whole]),
        Figure("without models: gRPC and Redis / PPO step", "%", shares("gRPC and Redis"), at_most=5, headline=True),
        Figure("without models: gRPC alone / PPO step", "%", shares("gRPC alone")),
        Figure("without models: Redis alone / PPO step", "%", shares("Redis alone")),
        *(Figure(f"without models: computed by {name}", "ms/rollout", values) for name, values in computed.items()),
    ]


def _with_models(passed: dict[str, list[Passed]], step_s: float) -> list[Figure]:
    services, alone = ([one.seconds for one in passed[way]] for way in ("through the services", "in one process"))
    added = [100 * (a - b) / step_s for a, b in zip(services, alone, strict=True)]
    return [
        Figure("with models: a step's rollouts through the services", "s", services),
        Figure("with models: a step's rollouts in one process", "s", alone),
        Figure("with models: what the services add / PPO step", "%", added, headline=True),
    ]


if __name__ == "__main__":
    main("transport", "Which share of a PPO step of the demo do gRPC and Redis take?", measure)
