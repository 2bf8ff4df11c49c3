"""What every service checks of token sequences before a model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from rlhf.errors import RequestError, TokenizerMismatch


def check_tokenizer(sha256: str, own_sha256: str, field: str) -> None:
    """
    Raises:
        TokenizerMismatch: a hash was sent, and it is of another tokenizer.
    """
    if sha256 and sha256 != own_sha256:
        raise TokenizerMismatch(
            f"{field}: the tokens were made by tokenizer {sha256[:12]}, and this service's model has {own_sha256[:12]}"
        )


def check_tokens(sequences: Sequence[NDArray[Any]], field: str, *, vocab_size: int, max_tokens: int) -> None:
    """
    Raises:
        RequestError: a sequence is empty or longer than the model's context, or a token is not in its vocabulary.
    """
    for index, tokens in enumerate(sequences):
        if len(tokens) == 0:
            raise RequestError(f"{field}: sequence {index} is empty")
        if len(tokens) > max_tokens:
            raise RequestError(
                f"{field}: sequence {index} has {len(tokens)} tokens and the model's context is {max_tokens}"
            )
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            worst = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise RequestError(
                f"{field}: sequence {index} has token {worst}, and the vocabulary ends at {vocab_size - 1}"
            )


def check_count(count: int, field: str, max_batch_size: int) -> None:
    """
    Raises:
        RequestError: none, or more than one call may bring.
    """
    if count == 0:
        raise RequestError(f"{field}: at least one item expected, none received")
    if count > max_batch_size:
        raise RequestError(f"{field}: {count} items, and max_batch_size is {max_batch_size}; send several calls")
