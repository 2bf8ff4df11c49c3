"""OpenAssistant's message trees, and their flat messages: each reply to a message is a completion of it. Only read.

Where the people's own rankings are kept (`events.ranking`) each is a judgment; else the consensus in `rank` is one.
Rankings of fewer than two replies that are still there, and those marked not rankable, say nothing.
Source: https://huggingface.co/datasets/OpenAssistant/oasst1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.rows import Refuse, Row
from rlhf.feedback.formats.conversations import as_text, noted_chat
from rlhf.feedback.formats.form import Options, as_json, dense, imported
from rlhf.feedback.judgments import Judgment

_ROLES = {"prompter": "user", "assistant": "assistant"}
Node = Mapping[str, Any]


def read(row: Row, options: Options) -> Iterator[Judgment]:
    number = 0
    for path in _paths([row.require("prompt", dict, "a message")]):
        for ids, ranks in _rankings(path[-1]):
            yield _judgment(row, options, path, ids, ranks, number)
            number += 1


def gather(rows: Iterator[Row], refuse: Refuse) -> Iterator[Row]:
    """Flat messages put together to trees, each in the place of its root; a tree as it is."""
    replies: dict[str, list[dict[str, Any]]] = {}
    roots: list[Row] = []
    for row in rows:
        if "message_id" not in row.fields:
            yield row
        elif row.fields.get("parent_id") is None:
            roots.append(row)
        else:
            replies.setdefault(row.fields["parent_id"], []).append(row.fields)
    for root in roots:
        yield Row({"prompt": _tree(root.fields, replies)}, root.path, root.line)


def _tree(message: dict[str, Any], replies: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {**message, "replies": [_tree(each, replies) for each in replies.get(message["message_id"], [])]}


def _paths(path: list[Node]) -> Iterator[list[Node]]:
    """From the root to every message that has replies."""
    if path[-1].get("replies"):
        yield path
        for reply in path[-1]["replies"]:
            yield from _paths([*path, reply])


def _rankings(message: Node) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Ids of replies and their ranks."""
    here = {reply["message_id"] for reply in message["replies"]}
    events = _events(message)
    for event in events:
        ids = [each for each in event["ranked_message_ids"] if each in here]
        if len(ids) >= 2 and not event.get("not_rankable"):
            yield ids, tuple(range(1, len(ids) + 1))
    ranked = [reply for reply in message["replies"] if reply.get("rank") is not None]
    if not events and len(ranked) >= 2:
        yield [each["message_id"] for each in ranked], dense([each["rank"] for each in ranked])


def _events(message: Node) -> Sequence[Node]:
    found: Sequence[Node] = (message.get("events") or {}).get("ranking") or []
    return found


def _judgment(
    row: Row, options: Options, path: Sequence[Node], ids: list[str], ranks: tuple[int, ...], number: int
) -> Judgment:
    replies = {reply["message_id"]: reply for reply in path[-1]["replies"]}
    chat = [{"role": _ROLES[each["role"]], "content": each["text"]} for each in path]
    texts = [replies[each]["text"] for each in ids]
    metadata = {"message_id": path[-1]["message_id"]}
    metadata |= {"policies": as_json([replies[each].get("model_name") for each in ids])}
    if len(chat) > 1:
        metadata |= noted_chat(chat, [[{"role": "assistant", "content": text}] for text in texts])
    prompt = as_text(chat) if len(chat) > 1 else chat[0]["content"]
    task = f"{options.dataset}/{path[-1]['message_id']}"
    return imported(row, options, texts, ranks, number=number, prompt=prompt, metadata=metadata, task_id=task)
