"""The policy service: `rlhf policy`. Knows an Engine; that it runs on `transformers` is known to `load_engine` alone.

gRPC call ──▶ requests.read_call ──▶ Calls ──▶ EngineThread: engine.submit
                                       ▲               │ step, step, step …
                                       └─── events ────┘
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.prompts import Message, Prompt, encode_prompt
from rlhf.errors import RlhfError
from rlhf.policy.calls import Calls
from rlhf.policy.engine import Engine
from rlhf.policy.engine_thread import EngineThread
from rlhf.policy.follower import REDIS_TIMEOUT_S, Follower
from rlhf.policy.requests import Codec, GenerateCall, read_call
from rlhf.policy.settings import PolicySettings
from rlhf.policy.weights import WeightChanges, WeightsServicer
from rlhf.serving.server import Server, Start, run_server
from rlhf.settings.run import Settings
from rlhf.v1 import policy_pb2, policy_pb2_grpc, weights_pb2_grpc
from rlhf.wire.messages import to_version
from rlhf.wire.records import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

POLICY = "rlhf.v1.PolicyService"
WEIGHTS = "rlhf.v1.WeightsService"
SERVICES = [POLICY, WEIGHTS]


def run(settings: Settings) -> None:
    """Serves until SIGTERM."""
    run_server("policy", settings.policy, SERVICES, starting(settings))


def starting(settings: Settings) -> Start:
    """How the service starts on a server."""

    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        engine, codec = await asyncio.to_thread(load_engine, settings)
        async with serving(server, engine, codec, settings.policy) as changes:
            if not settings.policy.join_run:
                await server.set_ready(POLICY, True)
                yield
                return
            async with _following(server, engine, changes, settings):
                yield

    return start


@asynccontextmanager
async def serving(
    server: Server, engine: Engine, codec: Codec, settings: PolicySettings
) -> AsyncIterator[WeightChanges]:
    """Both services on a server, over any engine."""
    calls = Calls(settings.answer_cache_s)

    def fail(error: BaseException) -> None:
        log.critical("the engine failed", exc_info=error)
        calls.fail(error)
        server.fail(RlhfError(f"the policy's engine failed: {type(error).__name__}: {error}"))

    thread = EngineThread(engine, calls.deliver, fail)
    calls.serve(engine, thread)
    changes = WeightChanges(engine, thread, keep=settings.in_flight == "keep")
    server.register(policy_pb2_grpc.add_PolicyServiceServicer_to_server, PolicyServicer(engine, calls, codec, settings))
    weights = WeightsServicer(changes, codec.sha256, engine.info.weights_bytes)
    server.register(weights_pb2_grpc.add_WeightsServiceServicer_to_server, weights)
    # A replica that lags behind takes weights before it takes prompts.
    await server.set_ready(WEIGHTS, True)
    try:
        yield changes
    finally:
        await asyncio.to_thread(thread.close)


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    def __init__(self, engine: Engine, calls: Calls, codec: Codec, settings: PolicySettings) -> None:
        self._engine = engine
        self._calls = calls
        self._codec = codec
        self._settings = settings

    async def Generate(self, request: policy_pb2.GenerateRequest, context: Any) -> policy_pb2.GenerateResponse:
        return await self._calls.answer(await self._read(request), _content(request))

    async def GenerateStream(
        self, request: policy_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[policy_pb2.GenerateEvent]:
        async for event in self._calls.events(await self._read(request), _content(request)):
            yield event

    async def Info(self, request: policy_pb2.PolicyInfoRequest, context: Any) -> policy_pb2.PolicyInfoResponse:
        info, load = self._engine.info, self._engine.load
        return policy_pb2.PolicyInfoResponse(
            model_type=info.model_type,
            vocab_size=info.vocab_size,
            max_context_tokens=info.context,
            max_new_tokens=self._settings.max_new_tokens,
            dtype=info.dtype,
            device=info.device,
            tokenizer_sha256=self._codec.sha256,
            current=to_version(self._engine.versions.current),
            running=load.running,
            waiting=load.waiting,
        )

    async def _read(self, request: policy_pb2.GenerateRequest) -> GenerateCall:
        if any(prompt.WhichOneof("input") != "token_ids" for prompt in request.prompts):
            # Tokenizing a long text takes a while, and health is asked meanwhile.
            return await asyncio.to_thread(read_call, request, self._codec, self._engine.info, self._settings)
        return read_call(request, self._codec, self._engine.info, self._settings)


class TokenizerCodec:
    """A `Codec` over a `transformers` tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sha256: str) -> None:
        self._tokenizer = tokenizer
        self.sha256 = sha256

    def encode_text(self, text: str) -> Tokens:
        return encode_prompt(Prompt(text, None, {}), self._tokenizer)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> Tokens:
        turns = tuple(Message(role, content) for role, content in messages)
        return encode_prompt(Prompt("", turns, {}), self._tokenizer)


@asynccontextmanager
async def _following(server: Server, engine: Engine, changes: WeightChanges, settings: Settings) -> AsyncIterator[None]:
    """The run's part: registered and following from here on, unregistered when the server drains."""
    from rlhf.queues.connection import connect
    from rlhf.queues.keys import RunKeys
    from rlhf.queues.registry import Registry

    client = await asyncio.to_thread(connect, settings)
    registry = Registry(client, RunKeys(settings.run.name), settings.redis.lease_s, REDIS_TIMEOUT_S)

    async def set_ready(ready: bool) -> None:
        if not server.draining.is_set():
            await server.set_ready(POLICY, ready)

    follower = Follower(registry, engine, changes, settings.policy, advertised(server, settings.policy), set_ready)
    tasks = [
        asyncio.create_task(follower.follow()),
        asyncio.create_task(follower.stay_registered(settings.redis.lease_s)),
    ]
    for task in tasks:
        task.add_done_callback(lambda done: _watch(done, server))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await follower.unregister()
        client.close()


def advertised(server: Server, settings: PolicySettings) -> str:
    """Where the trainer reaches this replica."""
    listens_everywhere = settings.host in ("0.0.0.0", "::")
    address = f"{socket.gethostname()}:{server.port}" if listens_everywhere else server.address
    return settings.advertise or address


def _watch(task: asyncio.Task[None], server: Server) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        server.fail(error)


def _content(request: policy_pb2.GenerateRequest) -> bytes:
    return request.SerializeToString(deterministic=True)


def load_engine(settings: Settings) -> tuple[Engine, Codec]:
    """The engine on `policy.model`, or on the run's start model, under a version of its own outside any run.

    Raises:
        ModelError: the folder cannot be used.
    """
    from rlhf.models.base import Base
    from rlhf.models.causal import load_causal_lm, weights_sha256
    from rlhf.models.compute import set_threads
    from rlhf.models.folders import start_model
    from rlhf.models.tokenizer import load_tokenizer
    from rlhf.policy.continuous import ContinuousEngine, Limits
    from rlhf.wire.records import WeightVersion

    policy = settings.policy
    set_threads(policy.threads)
    folder = Path(policy.model or start_model(settings))
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, device=policy.device, dtype=policy.dtype)
    version = WeightVersion("", 0, 0, weights_sha256(folder))
    limits = Limits(
        policy.max_sequences,
        policy.max_batch_tokens,
        policy.max_prefill_tokens,
        policy.max_waiting_sequences,
        settings.run.deterministic,
    )
    engine = ContinuousEngine(model, tokenizer, version, limits, Base(folder, version.sha256))
    return engine, TokenizerCodec(tokenizer, engine.tokenizer_sha256)
