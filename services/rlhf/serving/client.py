"""Channels to our services, and calls whose errors are RlhfErrors again.

    channel = connect("127.0.0.1:7102,127.0.0.1:7202", service="rlhf.v1.RewardService")
    answer = await call(RewardServiceStub(channel).Score, request, timeout_s=30)

What a channel does by itself, through gRPC's service config: calls go to the replicas in turn; a replica whose health
says NOT_SERVING gets none; UNAVAILABLE and RESOURCE_EXHAUSTED are tried again up to four times, after the server's
push-back where it gives one, for methods that may be repeated. A channel of grpc.aio belongs to one event loop, and no
process may fork after making one.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from rlhf.errors import DeadlineExceeded, SettingsError, Unavailable
from rlhf.serving.bearer import SyncBearer, aio_bearers, read_token
from rlhf.serving.status import from_rpc_error

Answer = TypeVar("Answer")
AnswerCo = TypeVar("AnswerCo", covariant=True)

MAX_MESSAGE_BYTES = 512 * 2**20
"""What a client accepts and sends at most: the largest `max_message_mib` of a server, which holds its own."""

SILENCE_MS = 10_000
"""A connection that has been silent for so long is asked for a sign of life, and given up after as long again: calls to
a replica that is frozen or cut off then fail, and are tried at another one."""

# Without Commit and Rollback, where the second of two equal calls does something else, and Upload, which is a stream.
_REPEATABLE = [
    {"service": "rlhf.v1.PolicyService"},
    {"service": "rlhf.v1.RewardService"},
    {"service": "rlhf.v1.ReferenceService"},
    {"service": "rlhf.v1.WeightsService", "method": "Prepare"},
    {"service": "rlhf.v1.WeightsService", "method": "Current"},
]
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}


class AioMethod(Protocol[AnswerCo]):
    """A method of a stub on an asynchronous channel, with one answer."""

    def __call__(
        self, request: Any, /, *, timeout: float | None, wait_for_ready: bool | None
    ) -> Awaitable[AnswerCo]: ...


def connect(
    address: str, *, service: str = "", token_file: Path | None = None, tls_ca: Path | None = None
) -> grpc.aio.Channel:
    """A channel of grpc.aio. Nothing is sent yet: a service that is away shows at the first call.

    Args:
        address: "host:port", or several separated by commas; a DNS name stands for all its addresses.
        service: full service name whose health decides which replicas get calls; empty: health is not asked, to reach
            a replica that is not ready too.
        token_file: file with the token to bring.
        tls_ca: PEM file with the authority that signed the servers' certificates; set: the connection uses TLS.

    Raises:
        SettingsError: the address or a file cannot be used.
    """
    target, options = _target(address), _options(address, service)
    interceptors = [] if token_file is None else aio_bearers(read_token(token_file))
    if tls_ca is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(target, _credentials(tls_ca), options=options, interceptors=interceptors)


def connect_sync(
    address: str, *, service: str = "", token_file: Path | None = None, tls_ca: Path | None = None
) -> grpc.Channel:
    """The same as a synchronous channel, usable from any thread."""
    target, options = _target(address), _options(address, service)
    if tls_ca is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, _credentials(tls_ca), options=options)
    return channel if token_file is None else grpc.intercept_channel(channel, SyncBearer(read_token(token_file)))


async def call(method: AioMethod[Answer], request: Any, *, timeout_s: float, wait_for_ready: bool = False) -> Answer:
    """One call with one answer.

    Args:
        method: of a stub on a channel from `connect`.
        request: the message; for a method that takes a stream, an asynchronous iterator of messages.
        timeout_s: for everything, attempts and waits between them included.
        wait_for_ready: wait for a connection until the deadline rather than fail once it was refused.

    Raises:
        RlhfError: of the class and with the message that the server raised.
    """
    _check_timeout(timeout_s, method)
    try:
        return await method(request, timeout=timeout_s, wait_for_ready=wait_for_ready)
    except grpc.aio.AioRpcError as failed:
        raise from_rpc_error(failed, _name(method)) from None


async def stream(
    method: Callable[..., Any], request: Any, *, timeout_s: float, wait_for_ready: bool = False
) -> AsyncIterator[Any]:
    """One call with a stream of answers; leaving the loop early cancels the call.

    Raises:
        RlhfError: as `call`; answers that came before stand.
    """
    _check_timeout(timeout_s, method)
    answers = method(request, timeout=timeout_s, wait_for_ready=wait_for_ready)
    try:
        async for answer in answers:
            yield answer
    except grpc.aio.AioRpcError as failed:
        raise from_rpc_error(failed, _name(method)) from None
    finally:
        answers.cancel()


def call_sync(method: Callable[..., Answer], request: Any, *, timeout_s: float, wait_for_ready: bool = False) -> Answer:
    """`call` on a channel from `connect_sync`."""
    _check_timeout(timeout_s, method)
    try:
        return method(request, timeout=timeout_s, wait_for_ready=wait_for_ready)
    except grpc.RpcError as failed:
        raise from_rpc_error(failed, _name(method)) from None  # type: ignore[arg-type]


def stream_sync(
    method: Callable[..., Any], request: Any, *, timeout_s: float, wait_for_ready: bool = False
) -> Iterator[Any]:
    """`stream` on a channel from `connect_sync`."""
    _check_timeout(timeout_s, method)
    answers = method(request, timeout=timeout_s, wait_for_ready=wait_for_ready)
    try:
        yield from answers
    except grpc.RpcError as failed:
        raise from_rpc_error(failed, _name(method)) from None  # type: ignore[arg-type]
    finally:
        answers.cancel()


def _check_timeout(timeout_s: float, method: object) -> None:
    if not timeout_s > 0:
        raise DeadlineExceeded(f"{_name(method)}: no time is left for the call")


def _name(method: object) -> str:
    """Full name of a stub's method, such as rlhf.v1.RewardService/Score."""
    path = getattr(method, "_method", b"")
    return (path if isinstance(path, str) else path.decode()).lstrip("/")


def _target(address: str) -> str:
    """gRPC's name for the address. A name that stands alone is resolved by gRPC, again whenever a connection is lost;
    gRPC takes lists as numbers only, so names in a list are resolved once, here."""
    parts = [part.strip() for part in address.split(",") if part.strip()]
    if not parts:
        raise SettingsError(f"address: host:port expected, {address!r} received")
    if len(parts) == 1 and parts[0].startswith("unix:"):
        return parts[0]
    pairs = [_host_and_port(part) for part in parts]
    if len(pairs) == 1:
        host, port = pairs[0]
        return f"dns:///{host}:{port}"
    return "ipv4:" + ",".join(f"{number}:{port}" for host, port in pairs for number in _ipv4_numbers(host))


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SettingsError(f"address: host:port expected, {address!r} received")
    return host, int(port)


def _ipv4_numbers(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Unavailable(f"address: the name {host} has no IPv4 address: {error.strerror}") from error
    return sorted({str(sockaddr[0]) for _, _, _, _, sockaddr in found})


def _options(address: str, service: str) -> list[tuple[str, Any]]:
    config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [{"name": _REPEATABLE, "retryPolicy": _RETRY}],
    }
    if service:
        config["healthCheckConfig"] = {"serviceName": service}
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", SILENCE_MS),
        # gRPC takes the longer of the two, and a minute by itself.
        ("grpc.keepalive_timeout_ms", SILENCE_MS),
        ("grpc.http2.ping_timeout_ms", SILENCE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # A restarted service is to be found within seconds; gRPC's own limit on the backoff is two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 3_000),
        # gRPC's own limit of 30 s would let a connection that has reached its age come back to the replicas of before.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ("grpc.enable_http_proxy", 0),  # a proxy for the web in the environment is none for these services
    ]
    if "," in address:
        # The authority (and with TLS the name in the certificate) would be a list of numbers otherwise.
        options.append(("grpc.default_authority", address.split(",")[0].strip()))
    return options


def _credentials(tls_ca: Path) -> grpc.ChannelCredentials:
    try:
        return grpc.ssl_channel_credentials(tls_ca.read_bytes())
    except OSError as error:
        raise SettingsError(f"tls_ca: {tls_ca} cannot be read: {error.strerror}") from error
