"""The reward service: `rlhf reward`. Calls come in here and leave as scores; `scorer.py` has what happens between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.errors import SettingsError
from rlhf.reward.aggregate import Aggregation, aggregation_of
from rlhf.reward.exchange import InService, Load, Loaded, first_loaded, follow
from rlhf.reward.requests import read_call
from rlhf.reward.rules import load_rule
from rlhf.reward.scorer import ModelScorer, RuleScorer, Scorer
from rlhf.reward.scores import Reading, Score
from rlhf.reward.settings import RewardSettings
from rlhf.serving.batcher import Limits
from rlhf.serving.fixed_shapes import LENGTH_STEP, ROWS, check_alike, in_fixed_shapes
from rlhf.serving.server import Server, Start, run_server
from rlhf.serving.worker_thread import WorkerThread
from rlhf.settings.run import Settings
from rlhf.v1 import reward_pb2, reward_pb2_grpc
from rlhf.wire.tensors import to_ragged, to_tensor

if TYPE_CHECKING:
    from rlhf.reward.head import RewardHead

SERVICE = "rlhf.v1.RewardService"


def run(settings: Settings) -> None:
    """Serves until SIGTERM."""
    run_server("reward", settings.reward, [SERVICE], starting(settings))


def starting(settings: Settings) -> Start:
    """How the service starts on a server."""

    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        load, pointer = partial(_load, settings), settings.reward.follow
        in_service = InService(await first_loaded(pointer, load), server.fail)
        await in_service.begin()
        server.register(
            reward_pb2_grpc.add_RewardServiceServicer_to_server, RewardServicer(in_service, settings.reward)
        )
        await server.set_ready(SERVICE, True)
        try:
            async with _following(pointer, in_service, load, settings.reward.follow_poll_s, server):
                yield
        finally:
            await in_service.end()

    return start


@asynccontextmanager
async def _following(
    pointer: Path | None, in_service: InService, load: Load, poll_s: float, server: Server
) -> AsyncIterator[None]:
    if pointer is None:
        yield
        return
    task = asyncio.create_task(follow(pointer, in_service, load, poll_s))

    def report(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            server.fail(error)

    task.add_done_callback(report)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    def __init__(self, in_service: InService, limits: RewardSettings) -> None:
        self._in_service = in_service
        self._limits = limits

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        call = read_call(request, self._limits.max_batch_size)
        scores, about = await self._in_service.score(call)
        values = np.array([score.score for score in scores], dtype=np.float32)
        members = np.array([score.members for score in scores], dtype=np.float32)
        response = reward_pb2.ScoreResponse(
            scores=to_tensor(values),
            member_scores=to_tensor(members),
            spreads=to_tensor(members.std(axis=1)),
            model_sha256=about.model_sha256,
        )
        if call.per_token:
            response.token_rewards.CopyFrom(to_ragged([score.token_rewards for score in scores], np.float32))
        return response

    async def Info(self, request: reward_pb2.RewardInfoRequest, context: Any) -> reward_pb2.RewardInfoResponse:
        about = self._in_service.about
        return reward_pb2.RewardInfoResponse(
            kind=about.kind,
            model_sha256=about.model_sha256,
            tokenizer_sha256=about.tokenizer_sha256,
            members=about.members,
            max_batch_tokens=self._limits.max_batch_tokens,
            normalisation_mean=about.mean,
            normalisation_std=about.std,
            aggregation=self._limits.aggregation if about.kind == "model" else "",
        )


async def _load(settings: Settings, folder: Path | None) -> Loaded:
    """In a thread of its own, so that another model may score meanwhile."""
    worker = WorkerThread("reward")
    return Loaded(await _scorer(settings, worker, folder), worker)


async def _scorer(settings: Settings, worker: WorkerThread, folder: Path | None) -> Scorer:
    """
    Args:
        folder: of a reward model; None: as the settings say.
    """
    reward = settings.reward
    if reward.rule and reward.model is not None:
        raise SettingsError("reward.model and reward.rule are both set; the service scores with one of them")
    limits = Limits(
        reward.max_batch_size, reward.max_batch_tokens, reward.max_waiting_items, reward.max_delay_ms / 1000
    )
    if reward.rule and folder is None:
        return RuleScorer(await worker.run(load_rule, reward.rule), worker, limits)
    folder = folder or reward.model or settings.paths.reward_model
    head = await worker.run(_load_head, folder, reward.device, reward.dtype, reward.threads, aggregation_of(reward))
    forward = await worker.run(_repeatable, head) if settings.run.deterministic else head.forward
    return ModelScorer(head, worker, limits, forward)


def _repeatable(head: RewardHead) -> Callable[[Sequence[Reading]], list[Score]]:
    """Its forward pass in fixed shapes.

    Raises:
        SettingsError: they are not enough on this machine.
    """
    forward = in_fixed_shapes(
        head.forward,
        length=lambda reading: len(reading.token_ids),
        filler=_filler,
        longest=head.max_context_tokens,
    )
    scores = forward([_filler(LENGTH_STEP // 2)] * (ROWS - 2))
    check_alike([(score.score, score.token_rewards.tobytes()) for score in scores], "the reward model")
    return forward


def _filler(tokens: int) -> Reading:
    return Reading(np.zeros(tokens, dtype=np.int64), 1, tokens)


def _load_head(folder: Path, device: str, dtype: str, threads: int, aggregation: Aggregation) -> RewardHead:
    # Imported here, so that the port is bound and health answers while torch loads, and a rule needs no torch.
    from rlhf.reward.head import RewardHead

    return RewardHead.load(folder, device, dtype, threads, aggregation)
