"""Streams both ways, what is too large or malformed, and addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from rlhf import errors
from rlhf.serving.client import call, connect, stream
from rlhf.serving.server import Server, running
from rlhf.settings import Listen
from rlhf.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc

SERVICES = ["rlhf.v1.PolicyService", "rlhf.v1.WeightsService"]
MIB = 2**20


class Policy(policy_pb2_grpc.PolicyServiceServicer):
    """Streams tokens until a test's own function ends it."""

    def __init__(self, after: Callable[[int], None] = lambda index: None) -> None:
        self.after = after
        self.gone = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> policy_pb2.GenerateResponse:
        return policy_pb2.GenerateResponse(request_id=str(len(request.request_id)))

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[policy_pb2.GenerateEvent]:
        try:
            for index in range(1000):
                self.after(index)
                yield policy_pb2.GenerateEvent(completion_index=index)
                await asyncio.sleep(0.01)
        finally:
            self.gone.set()


class Weights(weights_pb2_grpc.WeightsServiceServicer):
    async def Upload(self, requests: Any, context: Any) -> weights_pb2.PrepareResponse:
        size = 0
        async for chunk in requests:
            size += len(chunk.data)
            if chunk.data == b"bad":
                raise errors.ModelError("sha256 does not match")
        return weights_pb2.PrepareResponse(prepared=weights_pb2.WeightVersion(step=size))


@asynccontextmanager
async def serving(policy: Policy, **listen: Any) -> AsyncIterator[grpc.aio.Channel]:
    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        server.register(policy_pb2_grpc.add_PolicyServiceServicer_to_server, policy)
        server.register(weights_pb2_grpc.add_WeightsServiceServicer_to_server, Weights())
        yield

    async with (
        running("policy", Listen(**listen), SERVICES, start) as server,
        connect(server.address) as channel,
    ):
        yield channel


async def indices(channel: grpc.aio.Channel, most: int = 1000) -> list[int]:
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    got: list[int] = []
    async for event in stream(stub.GenerateStream, policy_pb2.GenerateRequest(), timeout_s=10):
        got.append(event.completion_index)
        if len(got) == most:
            break
    return got


def test_a_stream_that_fails_keeps_its_class() -> None:
    def fail_at_3(index: int) -> None:
        if index == 3:
            raise errors.WeightsMismatch("rolled back")

    async def scenario() -> None:
        async with serving(Policy(fail_at_3)) as channel:
            with pytest.raises(errors.WeightsMismatch, match="rolled back"):
                await indices(channel)

    asyncio.run(scenario())


def test_a_client_that_leaves_a_stream_ends_the_handler() -> None:
    async def scenario() -> None:
        policy = Policy()
        async with serving(policy) as channel:
            assert await indices(channel, most=2) == [0, 1]
            await asyncio.wait_for(policy.gone.wait(), 5)

    asyncio.run(scenario())


def test_an_upload() -> None:
    async def chunks(*pieces: bytes) -> AsyncIterator[weights_pb2.UploadChunk]:
        for piece in pieces:
            yield weights_pb2.UploadChunk(data=piece)

    async def scenario() -> None:
        async with serving(Policy()) as channel:
            upload = weights_pb2_grpc.WeightsServiceStub(channel).Upload
            assert (await call(upload, chunks(b"123", b"45"), timeout_s=5)).prepared.step == 5
            with pytest.raises(errors.ModelError, match="sha256"):
                await call(upload, chunks(b"123", b"bad"), timeout_s=5)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("size", "says"), [(MIB + 100, "the limit is 1048576; send it in parts"), (3 * MIB, "larger than max")]
)
def test_a_request_that_is_too_large_is_the_callers_mistake(size: int, says: str) -> None:
    async def scenario() -> None:
        async with serving(Policy(), max_message_mib=1) as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            fits = await call(stub.Generate, policy_pb2.GenerateRequest(request_id="x" * (MIB - 100)), timeout_s=10)
            assert fits.request_id == str(MIB - 100)
            with pytest.raises(errors.RequestError, match=says):
                await call(stub.Generate, policy_pb2.GenerateRequest(request_id="x" * size), timeout_s=10)

    asyncio.run(scenario())


def test_a_request_that_is_no_message_is_the_callers_mistake() -> None:
    async def scenario() -> None:
        async with serving(Policy()) as channel:
            generate = channel.unary_unary("/rlhf.v1.PolicyService/Generate")
            with pytest.raises(errors.RequestError, match="no valid protobuf message"):
                await call(generate, b"\xff\xff\xff", timeout_s=5)

    asyncio.run(scenario())


def test_a_method_that_does_not_exist() -> None:
    async def scenario() -> None:
        async with serving(Policy()) as channel:
            with pytest.raises(errors.RlhfError):
                await call(channel.unary_unary("/rlhf.v1.PolicyService/NoSuch"), b"", timeout_s=5)
            with pytest.raises(errors.RequestError, match="UNIMPLEMENTED"):
                await call(channel.unary_unary("/rlhf.v1.NoSuchService/Generate"), b"", timeout_s=5)

    asyncio.run(scenario())


def test_nobody_at_the_address() -> None:
    async def scenario() -> None:
        async with connect("127.0.0.1:9") as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            with pytest.raises(errors.Unavailable, match=r"rlhf\.v1\.PolicyService/Generate: UNAVAILABLE"):
                await call(stub.Generate, policy_pb2.GenerateRequest(), timeout_s=20)
            with pytest.raises(errors.DeadlineExceeded, match="no time is left"):
                await call(stub.Generate, policy_pb2.GenerateRequest(), timeout_s=0)

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["", " , ", "host", "host:", ":7101", "host:99999", "host:port", "a:1,b"])
def test_an_address_that_is_none(address: str) -> None:
    async def scenario() -> None:
        connect(address)

    with pytest.raises(errors.SettingsError, match="host:port expected"):
        asyncio.run(scenario())
