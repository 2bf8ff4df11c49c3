"""Chat messages beside texts: as one "role: content" line each, and exactly in `metadata["messages"]`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.form import as_json
from rlhf.feedback.judgments import Judgment

MESSAGES = "messages"
REPLIES = "replies"
"""In metadata, where a completion is more than one plain assistant's message: the messages of all, [K] lists."""
Message = Mapping[str, Any]


def messages_in(row: Row, value: object) -> list[dict[str, Any]]:
    """
    Raises:
        DataError: it is no list of objects with "role" and "content" strings.
    """
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise row.error(f'messages must be a list of {{"role", "content"}}, not {value!r:.60}')
    return [dict(message) for message in value]


def as_text(messages: Sequence[Message]) -> str:
    """As `rlhf.data.prompts` shows a chat to people."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def reply_text(messages: Sequence[Message]) -> str:
    """The content of a single assistant's message, else the whole of them as text."""
    return messages[0]["content"] if _is_plain_reply(messages) else as_text(messages)


def noted_chat(prompt: Sequence[Message], replies: Sequence[Sequence[Message]]) -> dict[str, str]:
    """The metadata from which `prompt_messages` and `reply_messages` come back exactly."""
    plain = all(map(_is_plain_reply, replies))
    return {MESSAGES: as_json(prompt)} | ({} if plain else {REPLIES: as_json(replies)})


def prompt_messages(judgment: Judgment) -> list[dict[str, Any]]:
    """The chat that the prompt is; of a plain prompt, one user's message."""
    if MESSAGES in judgment.metadata:
        found: list[dict[str, Any]] = json.loads(judgment.metadata[MESSAGES])
        return found
    return [{"role": "user", "content": judgment.prompt}]


def reply_messages(judgment: Judgment, index: int) -> list[dict[str, Any]]:
    if REPLIES in judgment.metadata:
        found: list[dict[str, Any]] = json.loads(judgment.metadata[REPLIES])[index]
        return found
    return [{"role": "assistant", "content": judgment.texts[index]}]


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _is_plain_reply(messages: Sequence[Message]) -> bool:
    return len(messages) == 1 and messages[0]["role"] == "assistant" and messages[0].keys() == {"role", "content"}
