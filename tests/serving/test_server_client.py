"""Server and client on loopback, with the reward service's proto and a servicer that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rlhf import errors
from rlhf.serving import server as server_module
from rlhf.serving.client import call, call_sync, connect, connect_sync
from rlhf.serving.server import Server, refuse_open_listening, running
from rlhf.settings import Listen
from rlhf.v1 import reward_pb2, reward_pb2_grpc

SERVICE = "rlhf.v1.RewardService"
Answer = Callable[[reward_pb2.ScoreRequest, Any], Awaitable[reward_pb2.ScoreResponse]]


async def answer_at_once(request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
    return reward_pb2.ScoreResponse(model_sha256="abc")


def failing(error: Exception) -> Answer:
    async def score(request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        raise error

    return score


class Servicer(reward_pb2_grpc.RewardServiceServicer):
    def __init__(self, answer: Answer) -> None:
        self.Score = answer  # type: ignore[method-assign]


def serving(answer: Answer = answer_at_once, *, ready: bool = True, **listen: Any) -> Any:
    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        server.register(reward_pb2_grpc.add_RewardServiceServicer_to_server, Servicer(answer))
        await server.set_ready(SERVICE, ready)
        yield

    return running("reward", Listen(**listen), [SERVICE], start)


async def score(address: str, *, timeout_s: float = 5, service: str = "", **connection: Any) -> str:
    async with connect(address, service=service, **connection) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        response = await call(stub.Score, reward_pb2.ScoreRequest(), timeout_s=timeout_s)
        return response.model_sha256


async def health_of(address: str, service: str) -> int:
    async with connect(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await call(stub.Check, health_pb2.HealthCheckRequest(service=service), timeout_s=5)).status


def test_a_call_is_answered() -> None:
    async def scenario() -> None:
        async with serving() as server:
            assert await score(server.address) == "abc"
            assert await score(server.address, service=SERVICE) == "abc"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "error",
    [
        errors.RequestError("tokens: wrong"),
        errors.RuleError("the rule raised"),
        errors.TokenizerMismatch("another tokenizer"),
        errors.WeightsMismatch("older weights"),
        errors.StorageError("disk full"),
        errors.ModelError("altered"),
        errors.DeadlineExceeded("took too long"),
        errors.StageFailed("no result"),
    ],
)
def test_an_error_keeps_its_class_and_message(error: errors.RlhfError) -> None:
    async def scenario() -> None:
        async with serving(failing(error)) as server:
            with pytest.raises(errors.RlhfError) as caught:
                await score(server.address)
            assert type(caught.value) is type(error)
            assert str(caught.value) == str(error)
            with pytest.raises(type(error), match=str(error)):
                await asyncio.to_thread(score_sync, server.address)

    asyncio.run(scenario())


def score_sync(address: str, **connection: Any) -> str:
    with connect_sync(address, **connection) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        return call_sync(stub.Score, reward_pb2.ScoreRequest(), timeout_s=5).model_sha256


def test_an_unexpected_error_is_one_line_of_internal(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving(failing(ValueError("first line\nsecond line"))) as server:
            with pytest.raises(errors.RlhfError, match=r"reward failed on .*ValueError: first line; its log") as caught:
                await score(server.address)
            assert "second line" not in str(caught.value)

    asyncio.run(scenario())
    assert "second line" in caplog.text
    assert "Traceback" in caplog.text


def test_a_full_queue_is_tried_again_after_the_servers_pushback() -> None:
    asked: list[float] = []

    async def full_twice(request: Any, context: Any) -> reward_pb2.ScoreResponse:
        asked.append(asyncio.get_running_loop().time())
        if len(asked) < 3:
            raise errors.Overloaded("full", retry_after_s=0.3)
        return reward_pb2.ScoreResponse(model_sha256="third")

    async def scenario() -> None:
        async with serving(full_twice) as server:
            assert await score(server.address) == "third"
        assert asked[1] - asked[0] > 0.25

    asyncio.run(scenario())


def test_what_cannot_pass_is_not_tried_again() -> None:
    asked = 0

    async def disk_full(request: Any, context: Any) -> reward_pb2.ScoreResponse:
        nonlocal asked
        asked += 1
        raise errors.StorageError("disk full")

    async def scenario() -> None:
        async with serving(disk_full) as server:
            with pytest.raises(errors.StorageError):
                await score(server.address)

    asyncio.run(scenario())
    assert asked == 1


def test_health_is_live_at_once_and_ready_when_loaded() -> None:
    async def scenario() -> None:
        loaded = asyncio.Event()
        bound: asyncio.Future[Server] = asyncio.get_running_loop().create_future()

        @asynccontextmanager
        async def start(server: Server) -> AsyncIterator[None]:
            bound.set_result(server)
            await loaded.wait()
            server.register(reward_pb2_grpc.add_RewardServiceServicer_to_server, Servicer(answer_at_once))
            await server.set_ready(SERVICE, True)
            yield

        async def serve() -> None:
            async with running("reward", Listen(), [SERVICE], start) as server:
                await server.wait_for_failure()

        task = asyncio.create_task(serve())
        address = (await bound).address
        assert await health_of(address, "") == health_pb2.HealthCheckResponse.SERVING
        assert await health_of(address, SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(errors.Unavailable, match="still loading"):
            await score(address, timeout_s=20)
        loaded.set()
        assert await score(address, timeout_s=20) == "abc"
        assert await health_of(address, SERVICE) == health_pb2.HealthCheckResponse.SERVING
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_a_replica_that_is_not_ready_gets_no_calls() -> None:
    async def scenario() -> None:
        async def never(request: Any, context: Any) -> reward_pb2.ScoreResponse:
            raise errors.RequestError("this one is not ready")

        async with serving(never, ready=False) as not_ready, serving() as ready:
            addresses = f"{not_ready.address},localhost:{ready.port}"
            async with connect(addresses, service=SERVICE) as channel:
                stub = reward_pb2_grpc.RewardServiceStub(channel)
                for _ in range(10):
                    await call(stub.Score, reward_pb2.ScoreRequest(), timeout_s=5)
                await not_ready.set_ready(SERVICE, True)
                with pytest.raises(errors.RequestError):
                    await call_until_it_fails(stub)

    asyncio.run(scenario())


async def call_until_it_fails(stub: Any) -> None:
    for _ in range(200):
        await call(stub.Score, reward_pb2.ScoreRequest(), timeout_s=5)
        await asyncio.sleep(0.01)


def test_calls_in_flight_finish_while_draining_and_readiness_goes_first() -> None:
    async def scenario() -> None:
        entered, seen = asyncio.Event(), []

        async def slow(request: Any, context: Any) -> reward_pb2.ScoreResponse:
            entered.set()
            await server.draining.wait()
            await asyncio.sleep(0.3)
            return reward_pb2.ScoreResponse(model_sha256="finished")

        started = asyncio.get_running_loop().time()
        async with serving(slow, grace_s=30) as server, connect(server.address, service=SERVICE) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            in_flight = asyncio.create_task(call(stub.Score, reward_pb2.ScoreRequest(), timeout_s=20))
            await entered.wait()
            drain = asyncio.create_task(server.drain())
            seen.append((await in_flight).model_sha256)
            with pytest.raises(errors.Unavailable):
                await call(stub.Score, reward_pb2.ScoreRequest(), timeout_s=20)
            await drain
        assert seen == ["finished"]
        assert asyncio.get_running_loop().time() - started < 15

    asyncio.run(scenario())


def test_a_call_that_outlives_the_grace_is_ended() -> None:
    async def scenario() -> None:
        entered = asyncio.Event()

        async def endless(request: Any, context: Any) -> reward_pb2.ScoreResponse:
            entered.set()
            await asyncio.sleep(60)
            return reward_pb2.ScoreResponse()

        async with serving(endless, grace_s=0.2) as server:
            in_flight = asyncio.create_task(score(server.address, timeout_s=30))
            await entered.wait()
        with pytest.raises(errors.Unavailable):
            await in_flight

    asyncio.run(scenario())


def test_the_deadline_reaches_the_handler() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def endless(request: Any, context: Any) -> reward_pb2.ScoreResponse:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.set()
                raise
            return reward_pb2.ScoreResponse()

        async with serving(endless) as server:
            with pytest.raises(errors.DeadlineExceeded):
                await score(server.address, timeout_s=0.3)
            await asyncio.wait_for(ended.wait(), 5)
            ended.clear()
            task = asyncio.create_task(score(server.address, timeout_s=30))
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(scenario())


def test_a_token_is_asked_of_all_but_health(tmp_path: Path) -> None:
    token_file, wrong_file = tmp_path / "token", tmp_path / "wrong"
    token_file.write_text("s3cret\n")
    wrong_file.write_text("s3cre\n")

    async def scenario() -> None:
        async with serving(token_file=token_file) as server:
            for connection in ({}, {"token_file": wrong_file}):
                with pytest.raises(errors.NotAuthorized):
                    await score(server.address, **connection)
                with pytest.raises(errors.NotAuthorized):
                    await asyncio.to_thread(score_sync, server.address, **connection)
            assert await score(server.address, token_file=token_file, service=SERVICE) == "abc"
            assert await asyncio.to_thread(score_sync, server.address, token_file=token_file) == "abc"
            assert await health_of(server.address, SERVICE) == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as refused:
                await asyncio.to_thread(list_services, server.address)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
            assert SERVICE in await asyncio.to_thread(list_services, server.address, token_file=token_file)

    asyncio.run(scenario())


def list_services(address: str, **connection: Any) -> list[str]:
    with connect_sync(address, **connection) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="*")]), timeout=5
        )
        return [service.name for answer in answers for service in answer.list_services_response.service]


def test_a_port_in_use_is_named() -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(errors.PortInUse, match=f"port {port} on 127.0.0.1 is in use"):
                async with serving(port=port):
                    pass
        async with serving() as first:
            with pytest.raises(errors.PortInUse):
                async with serving(port=first.port):
                    pass

    asyncio.run(scenario())


def test_an_address_that_is_not_this_machines_is_named(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("s3cret")

    async def scenario() -> None:
        async with serving(host="192.0.2.1", port=1, token_file=token_file):
            pass

    with pytest.raises(errors.MachineError, match=r"192\.0\.2\.1:1"):
        asyncio.run(scenario())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "some-host"])
def test_listening_beyond_loopback_needs_token_or_tls(host: str) -> None:
    with pytest.raises(errors.SettingsError, match="token_file"):
        refuse_open_listening("reward", Listen(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_nothing(host: str) -> None:
    refuse_open_listening("reward", Listen(host=host))


def test_the_health_of_a_service_as_a_command() -> None:
    async def probe(address: str, service: str) -> int:
        command = [sys.executable, "-m", "rlhf.supervisor.health", address, service]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        return await asyncio.wait_for(process.wait(), 30)

    async def scenario() -> None:
        async with serving() as server:
            assert await probe(server.address, SERVICE) == 0
            await server.set_ready(SERVICE, False)
            assert await probe(server.address, SERVICE) == 1
        assert await probe(server.address, SERVICE) == 1, "nobody listens any more"

    asyncio.run(scenario())


def test_the_health_command_imports_no_settings() -> None:
    code = "import sys, rlhf.supervisor.health; sys.exit('pydantic' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_calls_do_not_notice_that_their_connection_reaches_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections end every now and then, so that clients resolve the name again and find new replicas."""
    aged = [(name, 500 if name == "grpc.max_connection_age_ms" else value) for name, value in server_module._OPTIONS]
    assert ("grpc.max_connection_age_ms", 500) in aged
    monkeypatch.setattr(server_module, "_OPTIONS", aged)

    async def scenario() -> None:
        peers = set()

        async def remember(request: Any, context: Any) -> reward_pb2.ScoreResponse:
            peers.add(context.peer())
            await asyncio.sleep(0.02)
            return reward_pb2.ScoreResponse()

        async with serving(remember) as server, connect(server.address, service=SERVICE) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            for _ in range(100):
                await call(stub.Score, reward_pb2.ScoreRequest(), timeout_s=5)
        assert len(peers) > 1, "the connection never changed"

    asyncio.run(scenario())
