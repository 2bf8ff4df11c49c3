"""The engine on `transformers` models: continuous batching over one or two sets of weights.

    step:  schedule  waiting sequences join while the bounds allow, in order of arrival
           run       one forward pass per lane samples a token for each of its rows
           settle    finished sequences leave, and their rows are free for the next step

A lane is a set of weights with its cache and sequences. There are two, made of the same architecture: `current`, where
sequences start, and a spare one, which holds the previous weights for a rollback until a prepare loads the next ones
into it. After a commit that waits, both run until the old sequences are done.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import (
    DeadlineExceeded,
    ModelError,
    Overloaded,
    RequestError,
    RlhfError,
    TokenizerMismatch,
    WeightsMismatch,
)
from rlhf.models.base import Base
from rlhf.models.tokenizer import end_token_ids, tokenizer_sha256
from rlhf.models.weights import AdapterOf, copy_weights, load_weights, named_weights, read_manifest
from rlhf.policy.cache import check_cacheable
from rlhf.policy.engine import EngineInfo, Event, Failed, GenerationRequest, Load, Versions
from rlhf.policy.generation import Generation
from rlhf.policy.lane import FixedShape, Lane
from rlhf.serving.fixed_shapes import check_alike
from rlhf.wire.records import Sampling, Stopping, WeightVersion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """As in PolicySettings."""

    max_sequences: int = 64
    max_batch_tokens: int = 16384
    max_prefill_tokens: int = 4096
    max_waiting_sequences: int = 1024
    deterministic: bool = False
    """As `run.deterministic`: every forward pass has a shape that no other sequence has a part in."""


class ContinuousEngine:
    """An `Engine`. Everything but `prepare` belongs to one thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        version: WeightVersion,
        limits: Limits,
        base: Base | None = None,
    ) -> None:
        """
        Args:
            model: in eval mode; the engine keeps it.
            base: what published adapters are merged with. None: whole weights alone can be prepared.

        Raises:
            ModelError: its memory of earlier tokens cannot be kept in rows.
            SettingsError: it is to be deterministic, and this machine gives equal sequences unequal numbers.
        """
        self.info = _info(model, check_cacheable(model))
        self._tokenizer = tokenizer
        # Once: for a large vocabulary it takes a good part of a second, in which no other thread of Python runs.
        self.tokenizer_sha256 = tokenizer_sha256(tokenizer)
        self._eos_token_ids = end_token_ids(model, tokenizer)
        self._limits = limits
        self._base = base
        self._shape = self._fixed_shape() if limits.deterministic else None
        # Copied, because weights that lie elsewhere in memory may be summed in another order.
        self._current = Lane(copy.deepcopy(model) if self._shape else model, version, self._shape)
        self._spare: Lane | None = None
        self._previous: WeightVersion | None = None
        self._prepared: WeightVersion | None = None
        self._waiting: deque[Generation] = deque()
        self._finish_times: deque[float] = deque(maxlen=256)
        if self._shape is not None:
            self._check_places(self._shape)

    @property
    def versions(self) -> Versions:
        return Versions(self._current.version, self._previous, self._prepared)

    @property
    def load(self) -> Load:
        return Load(sum(len(lane.rows) for lane in self._lanes()), len(self._waiting))

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        generations = [Generation(request, self._text, self._eos_token_ids, self.info.context) for request in requests]
        self._check_limits(generations)
        excess = len(self._waiting) + len(generations) - self._limits.max_waiting_sequences
        if excess > 0:
            raise Overloaded(
                f"the policy has {len(self._waiting)} sequences waiting and takes "
                f"{self._limits.max_waiting_sequences}; try again later",
                retry_after_s=self._time_to_finish_s(excess),
            )
        self._waiting.extend(generations)

    def abort(self, ids: Iterable[int]) -> None:
        gone = frozenset(ids)
        self._waiting = deque(g for g in self._waiting if g.request.id not in gone)
        for lane in self._lanes():
            if leaving := {row for row in lane.rows if row.request.id in gone}:
                lane.leave(leaving)

    def step(self) -> list[Event]:
        events = self._admit()
        for lane in self._lanes():
            if lane.rows:
                events += self._advance(lane)
        return events

    def prepare(self, folder: Path, version: WeightVersion, timeout_s: float) -> None:
        if version in (self._current.version, self._prepared):
            return
        manifest = read_manifest(folder)
        if manifest.tokenizer_sha256 != self.tokenizer_sha256:
            raise TokenizerMismatch(f"{folder}: these weights belong to another tokenizer than the policy's")
        tensors = load_weights(folder, version)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"{folder}: {name} holds numbers that are not finite; the policy keeps its weights")
        spare = self._idle_spare(timeout_s)
        try:
            if manifest.adapter is None:
                copy_weights(spare.model, tensors)
            else:
                self._merge_into(spare.model, tensors, manifest.adapter)
        except ModelError as error:  # nothing was copied
            raise ModelError(f"{folder}: {error}") from error
        self._previous = None
        spare.load(version)
        self._prepared = version

    def commit(self, version: WeightVersion, expected_current: WeightVersion | None, *, keep: bool) -> None:
        if version == self._current.version:
            return
        self._check_current(expected_current)
        if version != self._prepared:
            held = "none are" if self._prepared is None else f"{self._prepared} are"
            raise WeightsMismatch(f"weights {version} are not prepared ({held}); call Prepare first")
        previous = self._current.version
        self._swap(keep)
        self._previous = previous

    def rollback(self, expected_current: WeightVersion | None, *, keep: bool) -> None:
        self._check_current(expected_current)
        if self._previous is None:
            raise WeightsMismatch("there are no previous weights to roll back to")
        self._swap(keep)
        self._previous = None

    def _admit(self) -> list[Event]:
        """Lets waiting sequences join the current lane, oldest first."""
        joining, failed = [], []
        budget = _Budget(self._limits, [row for lane in self._lanes() for row in lane.rows])
        while self._waiting and budget.takes(self._waiting[0]):
            generation = self._waiting.popleft()
            try:
                generation.request.requirement.check(self._current.version)
            except WeightsMismatch as error:
                failed.append(Failed(generation.request.id, error))
                continue
            budget.add(generation)
            joining.append(generation)
        if joining:
            self._current.join(joining)
        return cast(list[Event], failed)

    def _advance(self, lane: Lane) -> list[Event]:
        """One token for every row of a lane."""
        tokens, logprobs = lane.decode()
        events: list[Event] = []
        leaving: set[Generation] = set()
        for row, token, logprob in zip(lane.rows, tokens, logprobs, strict=True):
            if not math.isfinite(logprob):
                leaving.add(row)
                events.append(Failed(row.request.id, _not_finite(lane.version)))
                continue
            last = row.accept(token, logprob)
            if row.request.stream:
                events.append(row.last())
            if last:
                leaving.add(row)
                events.append(row.finished())
        if leaving:
            lane.leave(leaving)
            self._finish_times.extend([time.monotonic()] * len(leaving))
        return events

    def _swap(self, keep: bool) -> None:
        """Current and spare change places; with `keep` the sequences change with them."""
        assert self._spare is not None
        old, self._current, self._spare = self._current, self._spare, self._current
        self._prepared = None
        if keep:
            moving = {row for row in old.rows if _meets(row, self._current.version)}
            # To the head of the line, so that recomputing their caches is spread over steps like any prefill.
            self._waiting.extendleft(row for row in reversed(old.rows) if row in moving)
            old.leave(moving)

    def _merge_into(self, model: PreTrainedModel, tensors: Mapping[str, Tensor], adapter: AdapterOf) -> None:
        if self._base is None:
            raise ModelError("an adapter needs the model that it is for, and this policy has no folder of one")
        self._base.merge_into(model, tensors, adapter)

    def _idle_spare(self, timeout_s: float) -> Lane:
        """The lane that is not current, once its sequences are done. Built at the first call."""
        if self._spare is None:
            self._spare = Lane(copy.deepcopy(self._current.model), self._current.version, self._shape)
        if not self._spare.idle.wait(timeout_s):
            raise DeadlineExceeded(
                f"{len(self._spare.rows)} sequences still run on weights {self._spare.version}, whose place is needed"
            )
        return self._spare

    def _lanes(self) -> list[Lane]:
        return [self._current] if self._spare is None else [self._spare, self._current]

    def _text(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def _check_current(self, expected: WeightVersion | None) -> None:
        if expected is not None and expected != self._current.version:
            raise WeightsMismatch(f"weights {expected} are expected to be current and {self._current.version} are")

    def _check_limits(self, generations: Sequence[Generation]) -> None:
        if len(generations) > self._limits.max_waiting_sequences:
            raise RequestError(
                f"the call asks for {len(generations)} completions and the policy lets "
                f"{self._limits.max_waiting_sequences} wait; send fewer prompts at once"
            )
        longest = max((g.reserved_tokens for g in generations), default=0)
        if longest > self._limits.max_batch_tokens:
            raise RequestError(
                f"prompt and response may take {longest} tokens and the policy decodes {self._limits.max_batch_tokens} "
                "together; lower max_new_tokens, or raise policy.max_batch_tokens"
            )
        if self._shape is not None and longest > self._shape.columns:
            raise RequestError(
                f"prompt and response may take {longest} tokens and run.deterministic gives each of "
                f"policy.max_sequences = {self._shape.rows} sequences {self._shape.columns}, an equal share of "
                "policy.max_batch_tokens; raise that, or lower max_sequences or max_new_tokens"
            )

    def _fixed_shape(self) -> FixedShape:
        limits = self._limits
        columns = min(self.info.context, limits.max_batch_tokens // limits.max_sequences)
        return FixedShape(limits.max_sequences, max(columns, 1))

    def _check_places(self, shape: FixedShape) -> None:
        """Equal sequences in all places at once, through a prefill and a decode step.

        Raises:
            SettingsError: their log-probs differ.
        """
        length = min(12, shape.columns)
        prompt = (np.arange(length) % self.info.vocab_size).astype(np.int32)
        equal = [
            # An array of its own for each: equal arrays would share one prefill.
            GenerationRequest(place, prompt.copy(), 0, Sampling(), Stopping(max_new_tokens=1))
            for place in range(shape.rows)
        ]
        rows = [Generation(request, self._text, frozenset(), self.info.context) for request in equal]
        self._current.join(rows)
        tokens, logprobs = self._current.decode()
        self._current.leave(set(rows))
        check_alike(list(zip(tokens, logprobs, strict=True)), "the policy")

    def _time_to_finish_s(self, sequences: int) -> float:
        """How long that many sequences take to finish at the recent rate."""
        if len(self._finish_times) < 2:
            return 1.0
        per_sequence_s = (time.monotonic() - self._finish_times[0]) / len(self._finish_times)
        return min(max(sequences * per_sequence_s, 0.05), 30.0)


class _Budget:
    """What may still join in this step."""

    def __init__(self, limits: Limits, running: Sequence[Generation]) -> None:
        self._limits = limits
        self._sequences = len(running)
        self._tokens = sum(row.reserved_tokens for row in running)
        self._prompts: set[int] = set()
        self._longest = 0

    def takes(self, generation: Generation) -> bool:
        prompts = len(self._prompts | {id(generation.request.prompt)})
        longest = max(self._longest, len(generation.request.prompt) + len(generation.response))
        # A prompt longer than max_prefill_tokens goes alone, since it would never fit.
        return (
            self._sequences < self._limits.max_sequences
            and self._tokens + generation.reserved_tokens <= self._limits.max_batch_tokens
            and (prompts * longest <= self._limits.max_prefill_tokens or not self._prompts)
        )

    def add(self, generation: Generation) -> None:
        self._sequences += 1
        self._tokens += generation.reserved_tokens
        # A sequence that changes weights shares its prefill with no other.
        self._prompts.add(id(generation) if generation.response else id(generation.request.prompt))
        self._longest = max(self._longest, len(generation.request.prompt) + len(generation.response))


def _info(model: PreTrainedModel, context: int) -> EngineInfo:
    config = model.config.get_text_config(decoder=True)
    dtype = str(model.dtype).removeprefix("torch.")
    weights_bytes = sum(tensor.nbytes for tensor in named_weights(model).values())
    return EngineInfo(config.model_type, config.vocab_size, context, dtype, str(model.device), weights_bytes)


def _meets(row: Generation, version: WeightVersion) -> bool:
    try:
        row.request.requirement.check(version)
    except WeightsMismatch:
        return False
    return True


def _not_finite(version: WeightVersion) -> RlhfError:
    return ModelError(f"weights {version} give logits that are not finite; publish others, or use float32")
