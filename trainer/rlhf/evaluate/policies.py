"""The policies that are compared, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.prompts import Prompt, encode_prompt
from rlhf.errors import TokenizerMismatch
from rlhf.models.causal import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf.policy.sample import generate
from rlhf.reference.scorer import ReferenceModel
from rlhf.wire.records import Completion, Sampling, Stopping, Tokens


@dataclass(frozen=True)
class Answer:
    """One prompt and one policy's completion."""

    prompt: Prompt
    prompt_ids: Tokens
    """[P]"""
    completion: Completion
    tokenizer_sha256: str

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def response_ids(self) -> Tokens:
        """[R], the end token included where one was sampled."""
        return self.completion.token_ids

    @property
    def token_ids(self) -> Tokens:
        """[P + R]"""
        return np.concatenate([self.prompt_ids, self.response_ids])

    @property
    def ended(self) -> bool:
        return self.completion.finish_reason.ended


@dataclass(frozen=True)
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha256: str

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str) -> Self:
        """
        Raises:
            ModelError: the folder holds no causal language model with its tokenizer.
        """
        tokenizer = load_tokenizer(folder)
        return cls(load_causal_lm(folder, device=device, dtype=dtype), tokenizer, tokenizer_sha256(tokenizer))

    def answer(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        stopping: Stopping,
        on_finished: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """`sampling.completions` answers to each prompt, those of one prompt side by side: [P · K]. The same sampling
        seed uses the same random numbers with any policy."""
        ids = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        answered = generate(self.model, self.tokenizer, ids, sampling, stopping, on_finished=on_finished)
        return [
            Answer(prompt, prompt_ids, completion, self.tokenizer_sha256)
            for prompt, prompt_ids, completions in zip(prompts, ids, answered, strict=True)
            for completion in completions
        ]

    def as_reference(self) -> ReferenceModel:
        """For the log-probs of given tokens."""
        return ReferenceModel(self.model, model_sha256="", tokenizer_sha256=self.tokenizer_sha256)


def load_both(before: Path, after: Path, device: str, dtype: str) -> tuple[Policy, Policy]:
    """
    Raises:
        ModelError: a folder holds no causal language model.
        TokenizerMismatch: the policies have different tokenizers, so their tokens cannot be compared.
    """
    first = Policy.load(before, device, dtype)
    return first, load_like(first, after, device, dtype)


def load_like(first: Policy, folder: Path, device: str, dtype: str) -> Policy:
    """Another policy that reads and writes the same tokens.

    Raises:
        ModelError: the folder holds no causal language model.
        TokenizerMismatch: its tokenizer is another one.
    """
    second = Policy.load(folder, device, dtype)
    if first.tokenizer_sha256 != second.tokenizer_sha256:
        raise TokenizerMismatch(
            f"{folder} and the initial policy have different tokenizers; evaluation compares a policy with the one it "
            "came from"
        )
    return second
