"""The three services with everything but their models: recorded completions come back at once, scores are zeros.

Reading, checking, batching, threads, answer cache and messages are the product's own, so what is left is what the
services cost beside their models.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from rlhf.policy.engine import EngineInfo, Event, Finished, GenerationRequest, Load, Versions
from rlhf.policy.server import POLICY, SERVICES, serving
from rlhf.policy.settings import PolicySettings
from rlhf.reference.requests import Item
from rlhf.reference.server import SERVICE as REFERENCE
from rlhf.reference.server import ReferenceServicer
from rlhf.reward.exchange import InService, Loaded
from rlhf.reward.requests import TokenItem
from rlhf.reward.scorer import ModelScorer
from rlhf.reward.scores import About, Reading, Score
from rlhf.reward.server import SERVICE as REWARD
from rlhf.reward.server import RewardServicer
from rlhf.serving.batcher import Batcher, Limits
from rlhf.serving.server import Server, running
from rlhf.serving.worker_thread import WorkerThread
from rlhf.settings import Listen
from rlhf.settings.run import Settings
from rlhf.v1 import reference_pb2_grpc, reward_pb2_grpc
from rlhf.wire.records import FinishReason, Floats, Tokens, VersionSpan, WeightVersion

if TYPE_CHECKING:
    from rlhf.reference.scorer import ReferenceModel
    from rlhf.reward.head import RewardHead

START_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Recorded:
    """One completion as a policy once gave it."""

    token_ids: Tokens
    logprobs: Floats
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class NullModel:
    """What the services say of a model that is not there."""

    tokenizer_sha256: str
    vocab_size: int
    context: int
    answers: Mapping[int, Recorded]
    """By the seed that is asked for."""


@dataclass(frozen=True)
class NullServices:
    addresses: Mapping[str, str]
    """host:port of policy, reward and reference."""
    pid: int
    """One process holds them all."""


@contextmanager
def null_services(model: NullModel) -> Iterator[NullServices]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(model, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError("the services without models did not start")
        addresses: dict[str, str] = ours.recv()
        assert process.pid is not None
        yield NullServices(addresses, process.pid)
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve(model: NullModel, parent: Connection) -> None:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        asyncio.run(_serve_until_closed(model, parent))


async def _serve_until_closed(model: NullModel, parent: Connection) -> None:
    @asynccontextmanager
    async def policy(server: Server) -> AsyncIterator[None]:
        engine = _Engine(model)
        async with serving(server, engine, _Codec(model.tokenizer_sha256), PolicySettings()):
            await server.set_ready(POLICY, True)
            yield

    @asynccontextmanager
    async def reward(server: Server) -> AsyncIterator[None]:
        worker, settings = WorkerThread("reward"), Settings().reward
        scorer = ModelScorer(cast("RewardHead", _Head(model)), worker, _limits(settings.max_delay_ms))
        in_service = InService(Loaded(scorer, worker), server.fail)
        await in_service.begin()
        server.register(reward_pb2_grpc.add_RewardServiceServicer_to_server, RewardServicer(in_service, settings))
        await server.set_ready(REWARD, True)
        yield
        await in_service.end()

    @asynccontextmanager
    async def reference(server: Server) -> AsyncIterator[None]:
        worker, settings = WorkerThread("reference"), Settings().reference
        null = _Reference(model)
        batcher = Batcher(worker, null.forward, _limits(settings.max_delay_ms), length=lambda item: len(item.token_ids))
        async with batcher.running(server.fail):
            servicer = ReferenceServicer(cast("ReferenceModel", null), batcher, Settings())
            server.register(reference_pb2_grpc.add_ReferenceServiceServicer_to_server, servicer)
            await server.set_ready(REFERENCE, True)
            yield
        worker.close()

    async with (
        running("policy", Listen(), SERVICES, policy) as first,
        running("reward", Listen(), [REWARD], reward) as second,
        running("reference", Listen(), [REFERENCE], reference) as third,
    ):
        parent.send({"policy": first.address, "reward": second.address, "reference": third.address})
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(parent.recv)


def _limits(max_delay_ms: float) -> Limits:
    return Limits(256, 32768, 4096, max_delay_ms / 1000)


@dataclass(frozen=True)
class _Codec:
    sha256: str

    def encode_text(self, text: str) -> Tokens:
        raise NotImplementedError("only tokens are sent here")

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> Tokens:
        raise NotImplementedError("only tokens are sent here")


class _Engine:
    """An `Engine` whose every step finishes all that waits."""

    def __init__(self, model: NullModel) -> None:
        version = WeightVersion("", 0, 0, "")
        self.info = EngineInfo("none", model.vocab_size, model.context, "none", "none", 0)
        self.versions = Versions(version, None, None)
        self._answers = model.answers
        self._waiting: list[GenerationRequest] = []

    @property
    def load(self) -> Load:
        return Load(0, len(self._waiting))

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self._waiting.extend(requests)

    def abort(self, ids: object) -> None: ...

    def step(self) -> list[Event]:
        done, self._waiting = self._waiting, []
        return [self._finished(request) for request in done]

    def prepare(self, folder: Path, version: WeightVersion, timeout_s: float) -> None: ...

    def commit(self, version: WeightVersion, expected_current: WeightVersion | None, *, keep: bool) -> None: ...

    def rollback(self, expected_current: WeightVersion | None, *, keep: bool) -> None: ...

    def _finished(self, request: GenerationRequest) -> Finished:
        answer = self._answers[request.seed]
        spans = (VersionSpan(self.versions.current, 0, len(answer.token_ids)),)
        return Finished(request.id, answer.token_ids, answer.logprobs, answer.text, answer.finish_reason, "", spans)


class _Head:
    """A `RewardHead` that scores 0."""

    def __init__(self, model: NullModel) -> None:
        self.about = About("none", "0" * 64, model.tokenizer_sha256, 0.0, 1.0)
        self.vocab_size, self.max_context_tokens = model.vocab_size, model.context

    def reading(self, item: TokenItem) -> Reading:
        return Reading(item.token_ids, item.prompt_length, len(item.token_ids))

    def forward(self, readings: Sequence[Reading]) -> list[Score]:
        return [
            Score(0.0, np.zeros(one.length - one.prompt_length, np.float32), np.zeros(1, np.float32))
            for one in readings
        ]


class _Reference:
    """A `ReferenceModel` with log-probs of 0."""

    def __init__(self, model: NullModel) -> None:
        self.model_sha256, self.tokenizer_sha256 = "0" * 64, model.tokenizer_sha256
        self.vocab_size, self.max_context_tokens = model.vocab_size, model.context

    def forward(self, items: Sequence[Item]) -> list[Floats]:
        return [np.zeros(len(item.token_ids) - item.first_scored, np.float32) for item in items]
