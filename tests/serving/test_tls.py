"""TLS on loopback, with a certificate for localhost and 127.0.0.1 that signs itself and lasts a hundred years."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf import errors
from rlhf.serving.client import call, call_sync, connect, connect_sync
from rlhf.serving.server import Server, running
from rlhf.settings import Listen

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUYXJoKnU9C2Wp1859L/JhAbwCd70wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjA4NDcxNloYDzIxMjYxMDI5
MDg0NzE2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATBRBXK3DRwwjRTq8Tqu4cXnN+bovxbeCv4MATINL2Mpr7tYglrLEO1
OMuG+1wt2tatAVrw4MoemzWJLhgy09bao28wbTAdBgNVHQ4EFgQUk7nOaAfRUNWe
uvJiyYdzo0u8/ngwHwYDVR0jBBgwFoAUk7nOaAfRUNWeuvJiyYdzo0u8/ngwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgMS9Xq5oA5F7SrdJO5nhJLOSN/PF7kIuOAGJpm8BCMyYCIQD4
5VQbGv82b5KCX76EES+5zWUcvRpSFnV/9re3k0fTXw==
-----END CERTIFICATE-----
"""
# Made for this test, and guards nothing.
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgARHAtV9NUXoMmAC3
33yPyphcgwVWGAjEgb/t2IeAVaihRANCAATBRBXK3DRwwjRTq8Tqu4cXnN+bovxb
eCv4MATINL2Mpr7tYglrLEO1OMuG+1wt2tatAVrw4MoemzWJLhgy09ba
-----END PRIVATE KEY-----
"""


@asynccontextmanager
async def start(server: Server) -> AsyncIterator[None]:
    yield


@pytest.fixture
def pem(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(CERTIFICATE)
    key.write_text(KEY)
    return cert, key


async def is_live(address: str, tls_ca: Path | None) -> bool:
    async with connect(address, tls_ca=tls_ca) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await call(stub.Check, health_pb2.HealthCheckRequest(), timeout_s=5)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def is_live_sync(address: str, tls_ca: Path) -> bool:
    with connect_sync(address, tls_ca=tls_ca) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = call_sync(stub.Check, health_pb2.HealthCheckRequest(), timeout_s=5)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_calls_over_tls(pem: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        async with running("reward", Listen(tls_cert=pem[0], tls_key=pem[1]), [], start) as server:
            assert await is_live(server.address, pem[0])
            assert await is_live(f"localhost:{server.port}, 127.0.0.1:{server.port}", pem[0])
            assert await asyncio.to_thread(is_live_sync, server.address, pem[0])
            with pytest.raises(errors.Unavailable):
                await is_live(server.address, None)

    asyncio.run(scenario())


def test_certificate_and_key_that_do_not_belong_together(pem: tuple[Path, Path], tmp_path: Path) -> None:
    async def serve(listen: Listen) -> None:
        async with running("reward", listen, [], start):
            pass

    with pytest.raises(errors.SettingsError, match="belong together"):
        asyncio.run(serve(Listen(tls_cert=pem[0])))
    with pytest.raises(errors.SettingsError, match=r"no_key\.pem: cannot be read"):
        asyncio.run(serve(Listen(tls_cert=pem[0], tls_key=tmp_path / "no_key.pem")))
    pem[1].write_text("no key")
    with pytest.raises(errors.MachineError, match="check certificate and key"):
        asyncio.run(serve(Listen(tls_cert=pem[0], tls_key=pem[1])))


def test_files_that_a_client_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")

    async def connecting(**files: Path) -> None:
        connect("127.0.0.1:1", **files)

    with pytest.raises(errors.SettingsError, match=r"tls_ca: .* cannot be read"):
        asyncio.run(connecting(tls_ca=tmp_path / "none"))
    with pytest.raises(errors.SettingsError, match=r"token_file: .* cannot be read"):
        asyncio.run(connecting(token_file=tmp_path / "none"))
    with pytest.raises(errors.SettingsError, match="must hold one line"):
        asyncio.run(connecting(token_file=tmp_path / "empty"))
