"""Prompts: plain text, or chat messages that the tokenizer's chat template turns into text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.rows import Row, read_rows
from rlhf.errors import DataError, ModelError
from rlhf.wire.records import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """Such as "system", "user" or "assistant"; what is legal is up to the chat template."""
    content: str


@dataclass(frozen=True)
class Prompt:
    text: str
    """The prompt; of a chat, one "role: content" line per message, for people and reward rules to read."""
    messages: tuple[Message, ...] | None
    """None: plain text."""
    metadata: dict[str, str]
    """The row's other scalar fields; numbers and booleans as JSON writes them, nulls left out."""


def read_prompts(source: str | Path, limit: int = 0) -> list[Prompt]:
    """Prompts from rows with a string or messages in "prompt", or messages in "messages"; limit 0 takes all rows.

    Raises:
        DataError: see `rlhf.data.rows.read_rows`; or a row without a usable prompt.
    """
    return [prompt_from_row(row) for row in islice(read_rows(source), limit or None)]


def prompt_from_row(row: Row) -> Prompt:
    name = "prompt" if "prompt" in row.fields or "messages" not in row.fields else "messages"
    metadata = _metadata(row, without=name)
    if name == "prompt" and not isinstance(row.fields.get(name), list):
        return Prompt(row.text(name), None, metadata)
    messages = _messages(row, name)
    text = "\n".join(f"{message.role}: {message.content}" for message in messages)
    return Prompt(text, messages, metadata)


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokens of a prompt, [P] int32: messages through the chat template up to where the answer starts, text as it is.

    No special tokens are added beyond those that the tokenizer or its template puts there itself.

    Raises:
        ModelError: chat messages, and the tokenizer has no chat template.
        DataError: the template refuses the messages, or nothing is left to continue.
    """
    ids = tokenizer(prompt.text).input_ids if prompt.messages is None else _encode_chat(prompt.messages, tokenizer)
    if not ids:
        raise DataError(f"the prompt {prompt.text[:60]!r} has no tokens")
    return np.asarray(ids, dtype=np.int32)


def _encode_chat(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    import jinja2

    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer in {tokenizer.name_or_path or 'use'} has no chat template, which prompts made of messages "
            'need; use a chat model or plain text in "prompt"'
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        ids: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the messages {turns!r:.200}: {error}") from error
    return list(ids)


def _messages(row: Row, name: str) -> tuple[Message, ...]:
    turns = row.require(name, list, "a string or a list of messages")
    if not turns:
        raise row.error(f'field "{name}" holds no messages')
    return tuple(_message(row, name, turn) for turn in turns)


def _message(row: Row, name: str, turn: object) -> Message:
    if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        raise row.error(f'each message of "{name}" needs a string "role" and a string "content", not {turn!r:.60}')
    return Message(row.encodable(name, turn["role"]), row.encodable(name, turn["content"]))


def _metadata(row: Row, *, without: str) -> dict[str, str]:
    scalars = {k: v for k, v in row.fields.items() if k != without and isinstance(v, str | int | float)}
    return {k: row.encodable(k, v) if isinstance(v, str) else json.dumps(v) for k, v in scalars.items()}
