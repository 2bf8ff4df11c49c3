"""Chatbot Arena: the 55k prompts of lmsys/lmsys-arena-human-preference-55k, and FastChat's battles. Only read.

Two models' dialogues with the same person are compared whole: the first message is the prompt, all that follows a
completion. They were shown side by side, model A first. Sources: the data set's card;
FastChat's fastchat/serve/monitor/clean_battle_data.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.conversations import messages_in, reply_text
from rlhf.feedback.formats.form import Options, as_json, imported, noted
from rlhf.feedback.judgments import UNKNOWN_ANNOTATOR, Judgment

_RANKS = {"model_a": (1, 2), "model_b": (2, 1), "tie": (1, 1), "tie (bothbad)": (1, 1)}


def read_55k(row: Row, options: Options) -> Iterator[Judgment]:
    prompts = _listed(row, "prompt")
    dialogues = [_dialogue(prompts, _listed(row, f"response_{side}")) for side in "ab"]
    won = [name for name in ("model_a", "model_b", "tie") if row.fields[f"winner_{name}"]]
    if len(won) != 1:
        raise row.error(f"one of winner_model_a, winner_model_b and winner_tie must be 1, not {len(won)} of them")
    texts = [reply_text(dialogue) for dialogue in dialogues]
    metadata = noted(row.fields, "id") | _models(row)
    yield imported(row, options, texts, _RANKS[won[0]], prompt=prompts[0], metadata=metadata, order_shown=(0, 1))


def read_battle(row: Row, options: Options) -> Iterator[Judgment]:
    winner = row.text("winner")
    if winner not in _RANKS:
        raise row.error(f'"winner" must be one of {", ".join(_RANKS)}, not {winner!r}')
    first, second = (messages_in(row, row.fields.get(f"conversation_{side}")) for side in "ab")
    if first[0] != second[0] or min(len(first), len(second)) < 2:
        raise row.error("the conversations must begin with the same message and go on")
    noticed = noted(row.fields, "question_id", "turn", "anony", "language") | _models(row)
    yield imported(
        row,
        options,
        [reply_text(first[1:]), reply_text(second[1:])],
        _RANKS[winner],
        prompt=first[0]["content"],
        metadata=noticed,
        annotator=str(row.fields.get("judge") or UNKNOWN_ANNOTATOR),
        flags=("all-bad",) if winner == "tie (bothbad)" else (),
        order_shown=(0, 1),
        created_at=_when(row.fields.get("tstamp")),
    )


def _listed(row: Row, name: str) -> list[str]:
    """A JSON text that holds a list; an answer that failed is null there."""
    values = json.loads(row.text(name))
    return ["" if value is None else str(value) for value in values]


def _dialogue(prompts: Sequence[str], replies: Sequence[str]) -> list[dict[str, Any]]:
    turns = [{"role": "assistant", "content": replies[0]}]
    for prompt, reply in zip(prompts[1:], replies[1:], strict=True):
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return turns


def _models(row: Row) -> dict[str, str]:
    return {"policies": as_json([row.fields.get("model_a"), row.fields.get("model_b")])}


def _when(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
