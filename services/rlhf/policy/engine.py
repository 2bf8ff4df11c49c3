"""What the server knows of an engine: requests in, events out, weights changed in two phases. No torch here.

    thread of the engine    submit, abort, step, commit, rollback    one after the other, so no locks
    side thread             prepare                                  while the others go on

`rlhf.policy.continuous` is the implementation on `transformers`; another one only has to speak this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlhf.errors import RlhfError, WeightsMismatch
from rlhf.wire.records import (
    FinishReason,
    Floats,
    LogprobMode,
    Sampling,
    Stopping,
    Tokens,
    VersionSpan,
    WeightVersion,
)

SEEDS = 2**64
"""Seeds are below it, as in the protos; counting on from the last one begins at 0 again."""


@dataclass(frozen=True)
class Requirement:
    """A condition on the weights that a request may be answered with; at most one of the two is set."""

    exactly: WeightVersion | None = None
    """Same run, epoch, step and, unless empty, sha256."""
    at_least: WeightVersion | None = None
    """Same run, and (epoch, step) not older."""

    def check(self, current: WeightVersion) -> None:
        """
        Raises:
            WeightsMismatch: the weights do not meet it.
        """
        if self.exactly is not None and not _same(self.exactly, current):
            raise WeightsMismatch(f"weights {self.exactly} are asked for and the policy holds {current}")
        if self.at_least is not None and (current.run_id != self.at_least.run_id or current < self.at_least):
            raise WeightsMismatch(f"weights {self.at_least} or newer are asked for and the policy holds {current}")


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to generate."""

    id: int
    """Chosen by the caller, unique among those under way."""
    prompt: Tokens
    """[P], at least one. Requests that share the array share the computation of its cache."""
    seed: int
    """Taken modulo SEEDS."""
    sampling: Sampling
    stopping: Stopping
    logprob_mode: LogprobMode = LogprobMode.TEMPERATURE
    requirement: Requirement = Requirement()
    stream: bool = False
    """Report every token when it is sampled."""


@dataclass(frozen=True)
class TokenSampled:
    id: int
    token_id: int
    logprob: float | None
    text: str
    """What the token added to the text; empty inside a multi-byte character. Before a stop string is complete, its
    beginning is reported here."""


@dataclass(frozen=True)
class Finished:
    id: int
    token_ids: Tokens
    """[R], everything sampled."""
    logprobs: Floats | None
    """[R]; None with LogprobMode.NONE."""
    text: str
    """Decoded without special tokens, and cut before the stop string where one ended it."""
    finish_reason: FinishReason
    stopped_by: str
    versions: tuple[VersionSpan, ...]


@dataclass(frozen=True)
class Failed:
    id: int
    error: RlhfError


Event = TokenSampled | Finished | Failed


@dataclass(frozen=True)
class EngineInfo:
    model_type: str
    vocab_size: int
    context: int
    """Tokens of prompt and response together, at most."""
    dtype: str
    device: str
    weights_bytes: int
    """Of all tensors of one set of weights."""


@dataclass(frozen=True)
class Load:
    running: int
    """Sequences being decoded."""
    waiting: int
    """Sequences not yet admitted."""


@dataclass(frozen=True)
class Versions:
    current: WeightVersion
    previous: WeightVersion | None
    """None: nothing to roll back to."""
    prepared: WeightVersion | None


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    @property
    def versions(self) -> Versions: ...

    @property
    def load(self) -> Load: ...

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """All of them, or none.

        Raises:
            Overloaded: the waiting line has no room for them now.
            RequestError: one is beyond the limits and would never be admitted.
        """

    def abort(self, ids: Iterable[int]) -> None:
        """Their sequences leave at once, without an event. Unknown ids are those that have just finished."""

    def step(self) -> list[Event]:
        """Admits what fits and samples one token for every sequence under way."""

    def prepare(self, folder: Path, version: WeightVersion, timeout_s: float) -> None:
        """Verifies published weights and loads them beside the current ones, in place of the previous ones.

        Raises:
            ModelError: altered bytes, names or shapes of another model, numbers that are not finite. Nothing changed.
            TokenizerMismatch: made for another tokenizer.
            DeadlineExceeded: sequences on the previous weights did not finish in time.
        """

    def commit(self, version: WeightVersion, expected_current: WeightVersion | None, *, keep: bool) -> None:
        """New sequences start on the prepared weights. Those in flight finish on the weights they began with, or with
        `keep` continue on the new ones. Committing what is current changes nothing.

        Raises:
            WeightsMismatch: others are prepared, or current.
        """

    def rollback(self, expected_current: WeightVersion | None, *, keep: bool) -> None:
        """Back to the weights before the last commit.

        Raises:
            WeightsMismatch: there are none, or others are current.
        """


def _same(wanted: WeightVersion, held: WeightVersion) -> bool:
    same_place = (wanted.run_id, wanted.epoch, wanted.step) == (held.run_id, held.epoch, held.step)
    return same_place and wanted.sha256 in ("", held.sha256)
