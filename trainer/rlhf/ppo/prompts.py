"""The prompts of a run with their tokens, checked before anything is issued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf.data.prompts import encode_prompt, read_prompts
from rlhf.errors import DataError
from rlhf.wire.records import Tokens


@dataclass(frozen=True)
class EncodedPrompt:
    text: str
    metadata: Mapping[str, str]
    token_ids: Tokens
    """[P]"""


def encoded_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[EncodedPrompt]:
    """
    Args:
        max_tokens: longest prompt that leaves room for one response token.

    Raises:
        DataError: there are none, or one is empty or too long; names the file and the prompt.
    """
    encoded = []
    for number, prompt in enumerate(read_prompts(path), start=1):
        token_ids = encode_prompt(prompt, tokenizer)
        if not 0 < len(token_ids) <= max_tokens:
            raise DataError(
                f"prompt {number} has {len(token_ids)} tokens; between 1 and {max_tokens} fit, which leaves room for a "
                "response in the model's context",
                path=path,
            )
        encoded.append(EncodedPrompt(prompt.text, prompt.metadata, token_ids))
    if not encoded:
        raise DataError("there are no prompts in it", path=path)
    return encoded
