"""RlhfError <-> gRPC status, so that an error keeps its class and its sentence across a call.

The status carries a `google.rpc.ErrorInfo` whose reason is the class's name and whose domain is `rlhf-services`. A
client in another language reads code, message and reason; ours gets the same class back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from rlhf import errors
from rlhf.errors import RlhfError

DOMAIN = "rlhf-services"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
NEVER_RETRY = "-1"

Metadata = tuple[tuple[str, str | bytes], ...]

_CODES: dict[type[RlhfError], grpc.StatusCode] = {
    errors.RuleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TokenizerMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WeightsMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.StorageError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotAuthorized: grpc.StatusCode.UNAUTHENTICATED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RlhfError: grpc.StatusCode.INTERNAL,
}

# What a status without our ErrorInfo means: one that gRPC itself, a proxy or a foreign server made.
_CLASSES: dict[grpc.StatusCode, type[RlhfError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.CANCELLED: errors.Unavailable,  # our own cancellations surface as CancelledError, not as a status
    grpc.StatusCode.ABORTED: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: errors.NotAuthorized,
    grpc.StatusCode.PERMISSION_DENIED: errors.NotAuthorized,
    grpc.StatusCode.INVALID_ARGUMENT: errors.RequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.RequestError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.RequestError,
    grpc.StatusCode.UNIMPLEMENTED: errors.RequestError,
}


class FailedCall(Protocol):
    """What a synchronous `grpc.RpcError` and a `grpc.aio.AioRpcError` have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def code_of(error: RlhfError) -> grpc.StatusCode:
    """The code of the nearest class in the tree."""
    return next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)


def to_status(error: RlhfError) -> tuple[grpc.StatusCode, str, Metadata]:
    """Code, message and trailing metadata for `context.abort(*to_status(error))`."""
    code, message = code_of(error), str(error)
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(code=code.value[0], message=message, details=[detail])
    trailing: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    if isinstance(error, errors.Overloaded):
        trailing.append((PUSHBACK_KEY, str(max(1, round(error.retry_after_s * 1000)))))
    elif not error.retryable:
        # Codes are coarser than classes: a full disk shares its code with a full queue, and only one of them passes.
        trailing.append((PUSHBACK_KEY, NEVER_RETRY))
    return code, message, tuple(trailing)


def from_rpc_error(failed: FailedCall, called: str = "") -> RlhfError:
    """The error that a server raised, or the nearest class for a status that is not ours.

    Args:
        called: what was called, named in the message where the status is not ours.
    """
    trailing = dict(failed.trailing_metadata() or ())
    message = failed.details() or ""
    cls = _class_by_reason(trailing)
    if cls is None:
        return _foreign(failed.code(), message, called)
    if issubclass(cls, errors.Overloaded):
        return cls(message, retry_after_s=_pushback_s(trailing))
    return cls(message)


def _foreign(code: grpc.StatusCode, message: str, called: str) -> RlhfError:
    too_large = code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message
    cls = errors.RequestError if too_large else _CLASSES.get(code, RlhfError)
    return cls(f"{called or 'call'}: {code.name}: {message or 'no message'}")


def _class_by_reason(trailing: dict[str, Any]) -> type[RlhfError] | None:
    status = status_pb2.Status.FromString(trailing.get(DETAILS_KEY, b""))
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            return next((cls for cls in _tree(RlhfError) if cls.__name__ == info.reason), None)
    return None


def _pushback_s(trailing: dict[str, Any]) -> float:
    value = str(trailing.get(PUSHBACK_KEY, ""))
    return int(value) / 1000 if value.isdecimal() else 0.2


def _tree(cls: type[RlhfError]) -> Iterator[type[RlhfError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)
