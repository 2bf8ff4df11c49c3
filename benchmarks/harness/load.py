"""Clients of the policy service: as many calls in flight as allowed, or calls at times of their own.

Closed loop: the next call starts when one ends, so a slow service gets fewer calls; it measures throughput. Open loop:
calls start at times drawn beforehand, and latency counts from then, also where the client is late; it measures what a
user waits. Lengths are asked for exactly, so every way of serving gives the same number of tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from harness.model import Ask
from rlhf.serving.client import call, connect, stream
from rlhf.v1 import policy_pb2, policy_pb2_grpc
from rlhf.wire.tensors import from_tensor, to_tensor

SERVICE = "rlhf.v1.PolicyService"
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Answer:
    tokens: int
    latency_s: float
    """From the intended start."""
    first_token_s: float | None
    """From the intended start; None: the call did not stream."""


@dataclass(frozen=True)
class Load:
    seconds: float
    """To the last answer."""
    tokens: int
    answers: Sequence[Answer] = ()

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def latencies_s(self) -> list[float]:
        return [answer.latency_s for answer in self.answers]

    @property
    def first_tokens_s(self) -> list[float]:
        return [answer.first_token_s for answer in self.answers if answer.first_token_s is not None]


def message(ask: Ask) -> policy_pb2.GenerateRequest:
    """Plain sampling; log-probs come with it, because PPO needs them."""
    return policy_pb2.GenerateRequest(
        prompts=[policy_pb2.Prompt(token_ids=to_tensor(ask.prompt))],
        sampling=policy_pb2.Sampling(seed=ask.seed),
        stopping=policy_pb2.Stopping(max_new_tokens=ask.new_tokens, ignore_eos=True),
    )


def closed_loop(address: str, asks: Sequence[Ask], in_flight: int, *, streamed: bool = False) -> Load:
    """All of `asks` in their order, `in_flight` at a time."""
    return asyncio.run(_closed_loop(address, asks, in_flight, streamed))


def open_loop(address: str, asks: Sequence[Ask], per_s: float, *, seed: int, stream_every: int = 4) -> Load:
    """Poisson arrivals at a fixed rate. Every `stream_every`-th call streams and shows the time to its first token."""
    starts_s = np.cumsum(np.random.default_rng(seed).exponential(1 / per_s, len(asks)))
    return asyncio.run(_open_loop(address, asks, starts_s.tolist(), stream_every))


async def _closed_loop(address: str, asks: Sequence[Ask], in_flight: int, streamed: bool) -> Load:
    async with connect(address, service=SERVICE) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        await _all_connected(stub, address, asks[0])
        waiting = iter([message(ask) for ask in asks])
        answers: list[Answer] = []
        began_s = time.perf_counter()
        await asyncio.gather(*(_one_after_another(stub, waiting, answers, streamed) for _ in range(in_flight)))
        return _load(began_s, answers)


async def _one_after_another(
    stub: policy_pb2_grpc.PolicyServiceAsyncStub,
    waiting: Iterator[policy_pb2.GenerateRequest],
    answers: list[Answer],
    streamed: bool,
) -> None:
    for request in waiting:
        answers.append(await _ask(stub, request, time.perf_counter(), streamed))


async def _open_loop(address: str, asks: Sequence[Ask], starts_s: Sequence[float], stream_every: int) -> Load:
    async with connect(address, service=SERVICE) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        await _all_connected(stub, address, asks[0])
        requests = [message(ask) for ask in asks]
        calls = []
        began_s = time.perf_counter()
        for number, (request, start_s) in enumerate(zip(requests, starts_s, strict=True)):
            await asyncio.sleep(began_s + start_s - time.perf_counter())
            calls.append(asyncio.create_task(_ask(stub, request, began_s + start_s, number % stream_every == 0)))
        answers = await asyncio.gather(*calls)
        return _load(began_s, answers)


def _load(began_s: float, answers: Sequence[Answer]) -> Load:
    return Load(time.perf_counter() - began_s, sum(answer.tokens for answer in answers), answers)


async def _ask(
    stub: policy_pb2_grpc.PolicyServiceAsyncStub,
    request: policy_pb2.GenerateRequest,
    start_s: float,
    streamed: bool,
) -> Answer:
    first_s, tokens = None, 0
    if streamed:
        async for event in stream(stub.GenerateStream, request, timeout_s=TIMEOUT_S):
            first_s = first_s or time.perf_counter() - start_s
            tokens += event.HasField("token")
    else:
        response = await call(stub.Generate, request, timeout_s=TIMEOUT_S)
        tokens = sum(len(from_tensor(one.token_ids, "token_ids")) for one in response.completions)
    return Answer(tokens, time.perf_counter() - start_s, first_s)


async def _all_connected(stub: policy_pb2_grpc.PolicyServiceAsyncStub, address: str, ask: Ask) -> None:
    """A few calls for every replica, so that connections and first-time work are not measured."""
    for _ in range(4 * len(address.split(","))):
        await call(stub.Generate, message(ask), timeout_s=TIMEOUT_S, wait_for_ready=True)
