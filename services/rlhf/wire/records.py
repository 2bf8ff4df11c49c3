"""The records that travel, as frozen dataclasses over numpy arrays.

Shapes: `P` prompt tokens, `R` response tokens, `T` tokens of one completion's sequence (prompt and response), `M`
members of a reward ensemble, `H` hidden. Arrays are read-only by convention: nobody writes into a record it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@total_ordering
@dataclass(frozen=True, eq=True)
class WeightVersion:
    """Weights of a policy. Ordered inside a run by (epoch, step)."""

    run_id: str
    """Empty: a model folder served on its own, outside any run."""
    epoch: int
    """Grows on every restart of the trainer from a checkpoint, so no (epoch, step) names two sets of weights."""
    step: int
    """Optimisation steps behind these weights."""
    sha256: str
    """Lower-case hex of model.safetensors."""

    def __lt__(self, other: WeightVersion) -> bool:
        if self.run_id != other.run_id:
            raise ValueError(f"versions of different runs have no order: {self} and {other}")
        return (self.epoch, self.step) < (other.epoch, other.step)

    def __str__(self) -> str:
        return f"{self.run_id or '-'}/{self.epoch}-{self.step}/{self.sha256[:8]}"


@dataclass(frozen=True)
class VersionSpan:
    """The weights behind sampled tokens [start, end) of one completion, stamped by the policy service."""

    version: WeightVersion
    start: int
    end: int


class LogprobMode(Enum):
    """Of which distribution a log-prob is; the values are the proto's numbers."""

    NONE = 1
    RAW = 2
    TEMPERATURE = 3
    PROCESSED = 4


class FinishReason(Enum):
    """Why a completion ended; the values are the proto's numbers."""

    EOS = 1
    STOP_TOKEN = 2
    STOP_STRING = 3
    LENGTH = 4

    @property
    def ended(self) -> bool:
        """The policy ended the completion itself; LENGTH means it was cut."""
        return self is not FinishReason.LENGTH


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    """Divides the logits; 0 picks the most likely token."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """None: drawn by the policy."""
    completions: int = 1
    """K; completion k is sampled with seed + k."""


@dataclass(frozen=True)
class Stopping:
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Blob:
    """Bytes in a file of a folder that writer and reader share; `rlhf.wire.blobs` writes and reads them."""

    uri: str
    """file:///…"""
    size_bytes: int
    sha256: str
    """Lower-case hex."""


@dataclass(frozen=True)
class HiddenStates:
    """What a model's output layer reads, one row per token. Bytes rather than an array: numpy has no bfloat16."""

    dtype: str
    """"float32", "bfloat16" or "float16"."""
    shape: tuple[int, int]
    """Tokens and hidden size, [R, H]."""
    content: bytes | Blob
    """C order, little-endian."""


@dataclass(frozen=True)
class PromptTask:
    """One prompt to be answered K times. Written by the trainer's prompt source, read by a rollout worker."""

    rollout_id: str
    """<run>/<prompt index>/<attempt>: the id of the rollout it becomes."""
    run_id: str
    prompt_index: int
    """Position in the run's endless sequence of prompts."""
    attempt: int
    token_ids: Tokens
    """[P]"""
    text: str
    metadata: Mapping[str, str]
    """From the prompt's data row; reaches the reward service as it is."""
    sampling: Sampling
    stopping: Stopping
    at_least: WeightVersion | None
    """The policy must not be older. None: any."""
    tokenizer_sha256: str
    ref_hidden_states: bool = False
    """The reference is asked for hidden states in place of log-probs."""


@dataclass(frozen=True)
class Completion:
    """What the policy service answers for one completion."""

    prompt_index: int
    """Position of the prompt in the call."""
    completion_index: int
    token_ids: Tokens
    """[R], the end token included where one was sampled."""
    logprobs: Floats | None
    """[R]; None only with LogprobMode.NONE."""
    logprob_mode: LogprobMode
    text: str
    finish_reason: FinishReason
    stopped_by: str
    versions: tuple[VersionSpan, ...]
    """Cover every response token once, in order."""
    seed: int


@dataclass(frozen=True)
class ScoredCompletion:
    """One completion with everything PPO needs of it."""

    token_ids: Tokens
    """[T], prompt and response."""
    response_mask: Mask
    """[T], True = sampled by the policy."""
    logprobs: Floats
    """[T], at the sampling temperature; NaN where the mask is False."""
    ref_logprobs: Floats | None
    """[T], by the reference at the same temperature; NaN where the mask is False. None: `ref_hidden` is there."""
    score: float
    member_scores: Floats
    """[M]"""
    token_rewards: Floats | None
    """[T]; None: the reward service gives none."""
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    seed: int
    text: str
    ref_hidden: HiddenStates | None = None
    """[R, H], the reference's: one row for each token where the mask is True. None: `ref_logprobs` is there."""


@dataclass(frozen=True)
class Rollout:
    """A prompt with its K scored completions: the unit of the rollouts stream. Written by a rollout worker."""

    rollout_id: str
    run_id: str
    prompt_index: int
    attempt: int
    prompt: str
    metadata: Mapping[str, str]
    completions: tuple[ScoredCompletion, ...]
    sampling: Sampling
    reward_sha256: str
    reference_sha256: str
    worker: str
    created_unix_s: float

    @property
    def versions(self) -> tuple[WeightVersion, ...]:
        """Every version behind a token of it, oldest first."""
        return tuple(sorted({span.version for completion in self.completions for span in completion.versions}))
