"""Anthropic's HH-RLHF (`.jsonl.gz`): `chosen` and `rejected` dialogues, which part after the last shared "Assistant:".

The prompt keeps its "Human:" and "Assistant:" marks, which a prompt without them gets where it is written. A few rows'
dialogues have different numbers of turns; what follows the shared part is the completion, however long.
Source: https://huggingface.co/datasets/Anthropic/hh-rlhf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.conversations import MESSAGES, prompt_messages
from rlhf.feedback.formats.form import Options, imported, ordered, shared_start
from rlhf.feedback.judgments import Judgment

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARKS = {"user": HUMAN, "assistant": ASSISTANT}


def read(row: Row, options: Options) -> Iterator[Judgment]:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    before, mark, _ = shared_start(chosen, rejected).rpartition(ASSISTANT)
    if not before.strip() or chosen == rejected:
        raise row.error(f'"chosen" and "rejected" must share a dialogue up to {ASSISTANT!r} and then differ')
    prompt = before + mark
    yield imported(row, options, (chosen[len(prompt) :], rejected[len(prompt) :]), (1, 2), prompt=prompt)


def write(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    for judgment in judgments:
        prompt = transcript(judgment)
        for better, worse in ordered(judgment.ranks):
            yield {"chosen": prompt + judgment.texts[better], "rejected": prompt + judgment.texts[worse]}


def transcript(judgment: Judgment) -> str:
    """The prompt as a dialogue that the assistant goes on with."""
    if judgment.prompt.endswith(ASSISTANT) and MESSAGES not in judgment.metadata:
        return judgment.prompt
    turns = [f"{_MARKS.get(each['role'], HUMAN)} {each['content']}" for each in prompt_messages(judgment)]
    return "".join(turns) + ASSISTANT
