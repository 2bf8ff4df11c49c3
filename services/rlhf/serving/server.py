"""The gRPC server that policy, reward and reference share: its life, health, reflection, authorisation and errors.

    bind the port ── health "" answers SERVING: the process lives
        │
    start(server) ── loads the model; calls to a service that is not registered yet get UNAVAILABLE
        │
    ready ────────── "<name> listening on host:port"; a service's own health name says SERVING once it can answer
        │
    SIGTERM ──────── every name NOT_SERVING; calls in flight have `grace_s` to finish; start's clean-up; exit 0

A service is an asynchronous context manager that is given the server:

    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        model = await worker.run(load, settings)                         # never on the event loop
        server.register(add_RewardServiceServicer_to_server, RewardServicer(model))
        await server.set_ready("rlhf.v1.RewardService", True)
        yield                                                            # until the server has drained
        worker.close()

    run_server("reward", settings.reward, ["rlhf.v1.RewardService"], start)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rlhf.errors import MachineError, PortInUse, RlhfError, SettingsError
from rlhf.serving.bearer import read_token
from rlhf.serving.interceptors import BearerToken, Errors, NotYet
from rlhf.settings import Listen

log = logging.getLogger(__name__)

Servicer = TypeVar("Servicer")

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),  # two servers would share the port and halve each other's calls otherwise
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # clients ping every 10 s and are not to be cut off
    ("grpc.max_connection_age_ms", 30_000),  # makes clients resolve the name again and find new replicas
]


class Server:
    """One gRPC server of this process; belongs to the event loop that made it."""

    def __init__(self, name: str, listen: Listen, services: Sequence[str]) -> None:
        """
        Args:
            name: the word for this service, as in logs and commands.
            services: full names of the services that will be registered.

        Raises:
            SettingsError: it would listen beyond loopback without token or TLS, or a file of these cannot be used.
        """
        refuse_open_listening(name, listen)
        self.name = name
        self.port = 0
        self.draining = asyncio.Event()
        """Set when the drain begins: time to tell others that this process goes away."""
        self._listen = listen
        self._services = services
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=[*_OPTIONS, *_message_limits(listen)], interceptors=_interceptors(name, listen, services)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    @property
    def address(self) -> str:
        """host:port, once bound."""
        return f"{_bracketed(self._listen.host)}:{self.port}"

    def register(self, add_to_server: Callable[[Servicer, Any], None], servicer: Servicer) -> None:
        """Adds a servicer with its generated `add_…Servicer_to_server`, before or after the port is bound."""
        add_to_server(servicer, _GenericOnly(self._server))

    async def set_ready(self, service: str, ready: bool) -> None:
        """What health answers for a service's full name. Clients that check health send nothing while it is False."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(service, status)

    def fail(self, error: BaseException) -> None:
        """Drains and ends the process with this error: for background work that must not die unseen."""
        if not self._failure.done():
            self._failure.set_exception(error)

    async def wait_for_failure(self) -> None:
        """Waits for ever, or raises what was given to `fail`."""
        await asyncio.shield(self._failure)

    async def bind(self) -> None:
        """
        Raises:
            PortInUse: another process listens there.
            MachineError: the address cannot be listened on for another reason.
        """
        for service in self._services:
            await self.set_ready(service, False)
        credentials = _credentials(self._listen)
        wanted = f"{_bracketed(self._listen.host)}:{self._listen.port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(wanted)
            else:
                self.port = self._server.add_secure_port(wanted, credentials)
        except RuntimeError as error:
            raise _why_not_bound(self.name, self._listen) from error
        await self._server.start()
        log.info("bound to %s, loading", self.address)

    async def drain(self) -> None:
        """Takes no new calls, and lets those in flight finish within `grace_s`."""
        self.draining.set()
        await self._health.enter_graceful_shutdown()
        log.info("draining, at most %g s", self._listen.grace_s)
        await self._server.stop(self._listen.grace_s)

    async def close(self) -> None:
        """Ends every call at once."""
        await self._server.stop(None)


class _GenericOnly:
    """The part of a server that generated code may still use once it has started, without a warning."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """An optimisation of lookup that the asynchronous server offers before its start only."""


Start = Callable[[Server], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def running(name: str, listen: Listen, services: Sequence[str], start: Start) -> AsyncIterator[Server]:
    """A server from bound and ready to drained.

    Raises:
        PortInUse, SettingsError: before anything is loaded.
        RlhfError: whatever `start` raised.
    """
    server = Server(name, listen, services)
    await server.bind()
    try:
        async with start(server):
            print(f"{name} listening on {server.address}", flush=True)
            try:
                yield server
            finally:
                await server.drain()
    finally:
        await server.close()


def run_server(name: str, listen: Listen, services: Sequence[str], start: Start) -> None:
    """Serves until SIGTERM or SIGINT; a second signal cuts the drain short.

    Raises:
        RlhfError: the server could not start, or failed later (`Server.fail`).
    """
    asyncio.run(_until_signalled(name, listen, services, start))


async def _until_signalled(name: str, listen: Listen, services: Sequence[str], start: Start) -> None:
    loop, serving = asyncio.get_running_loop(), asyncio.current_task()
    assert serving is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        async with running(name, listen, services, start) as server:
            await server.wait_for_failure()


def refuse_open_listening(name: str, listen: Listen) -> None:
    """
    Raises:
        SettingsError: beyond loopback without token or TLS, or a certificate without its key.
    """
    if (listen.tls_cert is None) != (listen.tls_key is None):
        raise SettingsError(f"{name}: tls_cert and tls_key belong together; one of them is missing")
    if not (_is_loopback(listen.host) or listen.token_file or listen.tls_cert):
        raise SettingsError(
            f"{name}.host: {listen.host} can be reached from other machines; give token_file, or tls_cert and "
            "tls_key, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _message_limits(listen: Listen) -> list[tuple[str, int]]:
    # gRPC refuses what it will not even read with the code of a full queue, which clients retry. It reads twice the
    # limit, so that the interceptor can refuse with a sentence and a code that nobody retries.
    limit = listen.max_message_mib * 2**20
    return [("grpc.max_receive_message_length", 2 * limit), ("grpc.max_send_message_length", limit)]


def _interceptors(name: str, listen: Listen, services: Sequence[str]) -> list[Any]:
    authorised = [] if listen.token_file is None else [BearerToken(read_token(listen.token_file))]
    return [*authorised, NotYet(name, services), Errors(name, listen.max_message_mib * 2**20)]


def _credentials(listen: Listen) -> grpc.ServerCredentials | None:
    if listen.tls_cert is None or listen.tls_key is None:
        return None
    return grpc.ssl_server_credentials([(_read_pem(listen.tls_key), _read_pem(listen.tls_cert))])


def _read_pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error


def _why_not_bound(name: str, listen: Listen) -> RlhfError:
    """gRPC says only that it could not bind; a plain socket says why."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return PortInUse(
                f"{name}: port {listen.port} on {listen.host} is in use by another process; stop it, or set "
                f"{name}.port to another (0 takes a free one)"
            )
        return MachineError(f"{name}: cannot listen on {listen.host}:{listen.port}: {error.strerror or error}")
    return MachineError(f"{name}: cannot listen on {listen.host}:{listen.port}; with TLS, check certificate and key")
