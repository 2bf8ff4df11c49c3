"""Every error this project raises on purpose, as one tree.

The class says who can do something about it and whether trying again can help (`retryable`); the message says what
happened, to what, and what to do. `rlhf.serving.status` maps each class to a gRPC status and back, so an error
keeps its class across a call.

    RlhfError
    ├── InputError              what a person or caller gave is wrong                 INVALID_ARGUMENT
    │   ├── SettingsError       an unknown setting, or a value out of range
    │   ├── DataError           a data file: names the file and the line
    │   ├── ModelError          a model or weights folder: missing, truncated, altered, of another architecture
    │   ├── RequestError        an argument of a call
    │   ├── RuleError           a reward rule raised, or answered nonsense            FAILED_PRECONDITION
    │   ├── TokenizerMismatch   tokens of another tokenizer than the service's        FAILED_PRECONDITION
    │   └── WeightsMismatch     the weights held are not the ones asked for           FAILED_PRECONDITION
    ├── MachineError            the machine is not as needed
    │   ├── PortInUse
    │   ├── RedisUnsuitable     none bundled for the platform, too old, evicting, or without append-only file
    │   ├── StorageError        disk full, or a folder that cannot be written          RESOURCE_EXHAUSTED
    │   └── NotAuthorized       the token is missing or wrong                         UNAUTHENTICATED
    ├── StageFailed             a stage of a run ended without its result
    └── TransientError          trying again later can help                           retryable
        ├── Overloaded          a bounded queue is full                                RESOURCE_EXHAUSTED
        ├── Unavailable         a service or Redis does not answer, or is not ready    UNAVAILABLE
        └── DeadlineExceeded    a wait reached its deadline                            DEADLINE_EXCEEDED
"""

from __future__ import annotations

from typing import ClassVar


def first_line(error: BaseException) -> str:
    """What another library's error says, for a sentence of ours; the name of its class where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class RlhfError(Exception):
    """Base of the tree. `exit_code` is what a command exits with."""

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class InputError(RlhfError):
    exit_code = 2


class SettingsError(InputError):
    pass


class DataError(InputError):
    """A row that cannot be used. Build with the file and, where there is one, the line (1-based)."""

    def __init__(self, message: str, *, path: object = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)


class ModelError(InputError):
    pass


class RequestError(InputError):
    pass


class RuleError(InputError):
    pass


class TokenizerMismatch(InputError):
    pass


class WeightsMismatch(InputError):
    pass


class MachineError(RlhfError):
    exit_code = 3


class PortInUse(MachineError):
    pass


class RedisUnsuitable(MachineError):
    pass


class StorageError(MachineError):
    exit_code = 6
    """Its own, because a process that ended with it is not started again: a full disk does not empty itself."""


class NotAuthorized(MachineError):
    pass


class StageFailed(RlhfError):
    exit_code = 4


class TransientError(RlhfError):
    retryable = True
    exit_code = 5


class Overloaded(TransientError):
    """`retry_after_s` is the server's guess of when there is room; clients push back that long."""

    def __init__(self, message: str, *, retry_after_s: float = 0.2) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(TransientError):
    pass


class DeadlineExceeded(TransientError):
    pass
