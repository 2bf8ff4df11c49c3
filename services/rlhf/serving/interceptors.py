"""What every call passes through on the server: authorisation, readiness, and errors as statuses."""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health

from rlhf.errors import NotAuthorized, RequestError, RlhfError, Unavailable
from rlhf.serving.status import to_status

log = logging.getLogger(__name__)

# grpc's stubs describe handlers of the synchronous server only.
Handler = Any
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]
Context = grpc.aio.ServicerContext[Any, Any]


class BearerToken(grpc.aio.ServerInterceptor):
    """Lets in calls with `authorization: Bearer <token>`, and health checks, which orchestrators make without one."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        if _service(handler_call_details) == health.SERVICE_NAME or self._brings_token(handler_call_details):
            return await continuation(handler_call_details)
        return _refusing(NotAuthorized("the token is missing or wrong; send `authorization: Bearer …` with every call"))

    def _brings_token(self, call: grpc.HandlerCallDetails) -> bool:
        received = dict(call.invocation_metadata or ()).get("authorization", "")
        received_bytes = received if isinstance(received, bytes) else received.encode()
        return hmac.compare_digest(received_bytes, self._expected)


class NotYet(grpc.aio.ServerInterceptor):
    """Answers for services that will be there once the model is loaded: UNAVAILABLE, which clients try again."""

    def __init__(self, name: str, services: Sequence[str]) -> None:
        self._name = name
        self._services = frozenset(services)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None and _service(handler_call_details) in self._services:
            return _refusing(Unavailable(f"{self._name} is still loading; try again, or wait for its health"))
        return handler


class Errors(grpc.aio.ServerInterceptor):
    """RlhfError becomes its status; anything else is logged with its traceback and becomes one line of INTERNAL.

    It decodes requests too, so that a malformed or too large one is INVALID_ARGUMENT like every other wrong argument.
    """

    def __init__(self, name: str, max_message_bytes: int) -> None:
        self._name = name
        self._max_message_bytes = max_message_bytes

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or not _service(handler_call_details).startswith("rlhf."):
            return handler
        return self._wrap(handler, handler_call_details.method)

    def _wrap(self, handler: Handler, method: str) -> Handler:
        serializer = handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler, method), None, serializer)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler, method), None, serializer)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._upload(handler, method), None, serializer)
        raise NotImplementedError(f"{method}: bidirectional streams have no error handling yet")

    def _unary(self, handler: Handler, method: str) -> Any:
        async def call(data: bytes, context: Context) -> Any:
            try:
                return await handler.unary_unary(self._decode(handler, data), context)
            except Exception as error:
                await self._abort(error, method, context)

        return call

    def _stream(self, handler: Handler, method: str) -> Any:
        async def call(data: bytes, context: Context) -> AsyncIterator[Any]:
            try:
                async for answer in handler.unary_stream(self._decode(handler, data), context):
                    yield answer
            except Exception as error:
                await self._abort(error, method, context)

        return call

    def _upload(self, handler: Handler, method: str) -> Any:
        async def call(stream: AsyncIterator[bytes], context: Context) -> Any:
            try:
                requests = (self._decode(handler, data) async for data in stream)
                return await handler.stream_unary(requests, context)
            except Exception as error:
                await self._abort(error, method, context)

        return call

    def _decode(self, handler: Handler, data: bytes) -> Any:
        if len(data) > self._max_message_bytes:
            raise RequestError(
                f"the request has {len(data)} bytes and the limit is {self._max_message_bytes}; send it in parts"
            )
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            raise RequestError(f"the request is no valid protobuf message: {error}") from error

    async def _abort(self, error: Exception, method: str, context: Context) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, RlhfError):
            log.error("%s %s failed", self._name, method, exc_info=error)
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            error = RlhfError(f"{self._name} failed on {method}: {what}; its log has the traceback")
        await context.abort(*to_status(error))


def _service(call: grpc.HandlerCallDetails) -> str:
    """The full service name in "/rlhf.v1.RewardService/Score"."""
    return call.method.split("/")[1]


def _refusing(error: RlhfError) -> Handler:
    async def refuse(requests: AsyncIterator[Any], context: Context) -> None:
        await context.abort(*to_status(error))

    # On the wire every kind of call is a stream of messages, so this one handler refuses all four.
    return grpc.stream_stream_rpc_method_handler(refuse)
