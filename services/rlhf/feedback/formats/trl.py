"""TRL's preference forms: `prompt`, `chosen`, `rejected`, `margin`; texts or messages; with the prompt apart or inside.

Source: https://huggingface.co/docs/trl/dataset_formats. The margin is the strength of a preference between two. Ties
have no form here and are left out of what is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.conversations import (
    as_text,
    messages_in,
    noted_chat,
    prompt_messages,
    reply_messages,
    reply_text,
)
from rlhf.feedback.formats.form import Options, imported, margins, noted, ordered, shared_start
from rlhf.feedback.judgments import Judgment

_BESIDE = ("margin", "tools", "chat_template_kwargs")
_RANKS = (1, 2)


def read(row: Row, options: Options) -> Iterator[Judgment]:
    """Explicit or implicit, plain or conversational: what the row says itself."""
    chosen, rejected = row.fields.get("chosen"), row.fields.get("rejected")
    if isinstance(chosen, list):
        prompt, replies = _chat(row, messages_in(row, chosen), messages_in(row, rejected))
        texts, metadata = list(map(reply_text, replies)), noted_chat(prompt, replies)
        text = as_text(prompt)
    else:
        text, texts = _plain(row, row.text("chosen"), row.text("rejected"))
        metadata = {}
    metadata |= noted(row.fields, *_BESIDE)
    yield imported(row, options, texts, _RANKS, prompt=text, metadata=metadata, strength=strength_of(row))


def strength_of(row: Row) -> int | None:
    """A margin of 0, 1, 2 or 3; any other is on a scale of its own, and only in the metadata."""
    margin = row.fields.get("margin")
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    return int(margin) if is_number and margin in (0, 1, 2, 3) else None


def write_explicit(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    margin = margins(judgments)
    for judgment in judgments:
        for better, worse in ordered(judgment.ranks):
            texts = judgment.texts
            yield {"prompt": judgment.prompt, "chosen": texts[better], "rejected": texts[worse], **margin(judgment)}


def write_implicit(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    for row in write_explicit(judgments, options):
        prompt = row.pop("prompt")
        yield {**row, "chosen": prompt + row["chosen"], "rejected": prompt + row["rejected"]}


def write_conversational(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    margin = margins(judgments)
    for judgment in judgments:
        beside = {name: json.loads(judgment.metadata[name]) for name in _BESIDE[1:] if name in judgment.metadata}
        for better, worse in ordered(judgment.ranks):
            yield {
                "prompt": prompt_messages(judgment),
                "chosen": reply_messages(judgment, better),
                "rejected": reply_messages(judgment, worse),
                **beside,
                **margin(judgment),
            }


def write_unpaired(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    """`prompt`, `completion`, `label`: the best of a ranking are True, the worst False; those between say neither."""
    for judgment in judgments:
        best, worst = min(judgment.ranks), max(judgment.ranks)
        for text, rank in zip(judgment.texts, judgment.ranks, strict=True):
            if best < worst and rank in (best, worst):
                yield {"prompt": judgment.prompt, "completion": text, "label": rank == best}


def _plain(row: Row, chosen: str, rejected: str) -> tuple[str, list[str]]:
    if "prompt" in row.fields:
        return row.text("prompt"), [chosen, rejected]
    # As trl's extract_prompt: a space where the two part belongs to the completions.
    prompt = shared_start(chosen, rejected).removesuffix(" ")
    if not prompt.strip() or chosen == rejected:
        raise row.error('"chosen" and "rejected" must begin with one prompt and then differ')
    return prompt, [chosen[len(prompt) :], rejected[len(prompt) :]]


def _chat(
    row: Row, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    if "prompt" in row.fields:
        return messages_in(row, row.fields["prompt"]), [chosen, rejected]
    pairs = zip(chosen, rejected, strict=False)
    shared = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise row.error('"chosen" and "rejected" must begin with the same messages and then differ')
    return chosen[:shared], [chosen[shared:], rejected[shared:]]
