"""What a Generate call asks for, read from its message and checked before anything is queued."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from rlhf.errors import RequestError
from rlhf.policy.engine import SEEDS, EngineInfo, Requirement
from rlhf.policy.settings import PolicySettings
from rlhf.serving.token_checks import check_tokenizer, check_tokens
from rlhf.v1 import policy_pb2
from rlhf.wire.messages import from_sampling, from_stopping, from_version
from rlhf.wire.records import LogprobMode, Sampling, Stopping, Tokens
from rlhf.wire.tensors import from_tensor

MAX_STOP_STRINGS = 16
"""Each is looked for after every token."""


class Codec(Protocol):
    """The tokenizer, as far as requests need it."""

    @property
    def sha256(self) -> str: ...

    def encode_text(self, text: str) -> Tokens: ...

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> Tokens:
        """messages: (role, content)."""


@dataclass(frozen=True)
class GenerateCall:
    request_id: str
    named: bool
    """The caller chose the id, so it may ask again by it."""
    prompts: tuple[Tokens, ...]
    seeds: tuple[int, ...]
    """Of each prompt's first completion; completion k is sampled with seed + k."""
    sampling: Sampling
    """As applied; its seed is the first prompt's."""
    stopping: Stopping
    """As applied."""
    logprob_mode: LogprobMode
    requirement: Requirement


def read_call(
    message: policy_pb2.GenerateRequest, codec: Codec, info: EngineInfo, settings: PolicySettings
) -> GenerateCall:
    """
    Raises:
        RequestError: an argument is missing, malformed or out of range.
        TokenizerMismatch: the tokens were made by another tokenizer.
    """
    check_tokenizer(message.tokenizer_sha256, codec.sha256, "prompts")
    if not 1 <= len(message.prompts) <= settings.max_prompts_per_call:
        raise RequestError(
            f"prompts: 1 to {settings.max_prompts_per_call} expected in one call, {len(message.prompts)} received"
        )
    sampling = from_sampling(message.sampling)
    stopping = from_stopping(message.stopping, settings.max_new_tokens)
    check_sampling(sampling, stopping, info.vocab_size)
    if stopping.max_new_tokens > settings.max_new_tokens:
        raise RequestError(
            f"max_new_tokens: {stopping.max_new_tokens} is more than this service allows, {settings.max_new_tokens}"
        )
    prompts = [_prompt(prompt, index, codec) for index, prompt in enumerate(message.prompts)]
    check_prompts(prompts, info)
    seeds = _seeds(message, sampling)
    return GenerateCall(
        request_id=message.request_id or secrets.token_hex(16),
        named=bool(message.request_id),
        prompts=tuple(prompts),
        seeds=seeds,
        sampling=replace(sampling, seed=seeds[0]),
        stopping=stopping,
        logprob_mode=_logprob_mode(message.logprob_mode),
        requirement=_requirement(message),
    )


def check_prompts(prompts: Sequence[Tokens], info: EngineInfo) -> None:
    """
    Raises:
        RequestError: a prompt is empty, leaves no room in the context, or has a token outside the vocabulary.
    """
    check_tokens(prompts, "prompts", vocab_size=info.vocab_size, max_tokens=info.context)
    for index, prompt in enumerate(prompts):
        if len(prompt) == info.context:
            raise RequestError(
                f"prompts: sequence {index} has {len(prompt)} tokens and the model's context is {info.context}, which "
                "leaves no room for a response"
            )


def check_sampling(sampling: Sampling, stopping: Stopping, vocab_size: int) -> None:
    """
    Raises:
        RequestError: a number is out of range; names it, the rule and the value.
    """
    temperature = sampling.temperature
    rules = [
        ("temperature", temperature, temperature == 0 or 1e-3 <= temperature < math.inf, "0, or at least 0.001"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "in (0, 1]"),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "in [0, 1]"),
        ("repetition_penalty", sampling.repetition_penalty, 0 < sampling.repetition_penalty < math.inf, "> 0"),
        ("completions", sampling.completions, sampling.completions >= 1, ">= 1"),
        ("max_new_tokens", stopping.max_new_tokens, stopping.max_new_tokens >= 1, ">= 1"),
    ]
    for name, value, holds, rule in rules:
        if not holds:
            raise RequestError(f"{name}: must be {rule}, {value} received")
    if stopping.min_new_tokens > stopping.max_new_tokens:
        raise RequestError(
            f"min_new_tokens: {stopping.min_new_tokens} is more than max_new_tokens, {stopping.max_new_tokens}"
        )
    for token_id in stopping.stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"stop_token_ids: {token_id} is outside the vocabulary of {vocab_size}")
    if "" in stopping.stop_strings:
        raise RequestError("stop_strings: an empty string would end every completion at once")
    if len(set(stopping.stop_strings)) > MAX_STOP_STRINGS:
        raise RequestError(f"stop_strings: at most {MAX_STOP_STRINGS} expected, {len(stopping.stop_strings)} received")


def _prompt(prompt: policy_pb2.Prompt, index: int, codec: Codec) -> Tokens:
    kind = prompt.WhichOneof("input")
    if kind == "token_ids":
        tokens = from_tensor(prompt.token_ids, f"prompts[{index}].token_ids", dtypes="i", ndim=1)
        if len(tokens) and not -(2**31) <= int(tokens.min()) <= int(tokens.max()) < 2**31:
            raise RequestError(f"prompts[{index}].token_ids: {int(tokens.max())} is outside every vocabulary")
        return tokens.astype(np.int32)
    if kind == "text":
        return codec.encode_text(prompt.text)
    if kind == "chat":
        return codec.encode_chat([(turn.role, turn.content) for turn in prompt.chat.messages])
    raise RequestError(f"prompts[{index}]: token_ids, text or chat expected, none received")


def _seeds(message: policy_pb2.GenerateRequest, sampling: Sampling) -> tuple[int, ...]:
    """One per prompt: its own, that of all, or drawn here."""
    if not message.seeds:
        return tuple(secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed for _ in message.prompts)
    if sampling.seed is not None:
        raise RequestError(f"seeds: {len(message.seeds)} received beside sampling.seed {sampling.seed}; give only one")
    if len(message.seeds) != len(message.prompts):
        raise RequestError(
            f"seeds: one for each prompt, {len(message.prompts)}, expected, {len(message.seeds)} received"
        )
    return tuple(message.seeds)


def _logprob_mode(number: int) -> LogprobMode:
    if number == policy_pb2.LOGPROB_MODE_UNSPECIFIED:
        return LogprobMode.TEMPERATURE
    try:
        return LogprobMode(number)
    except ValueError:
        raise RequestError(f"logprob_mode: {number} is none of the modes") from None


def _requirement(message: policy_pb2.GenerateRequest) -> Requirement:
    kind = message.weights.WhichOneof("kind")
    if kind == "exactly":
        return Requirement(exactly=from_version(message.weights.exactly))
    if kind == "at_least":
        return Requirement(at_least=from_version(message.weights.at_least))
    return Requirement()
