"""HelpSteer2-Preference and HelpSteer3: two responses, and each annotator's score from -3 (the first) to 3. Only read.

Each annotator's score is a judgment; where a row keeps none, the overall one is. The annotators have no names; their
places in a row are no persons. HelpSteer2's -100, "neither", orders nothing and is left out. Columns as in the data
sets' cards: https://huggingface.co/datasets/nvidia/HelpSteer2 (preference) and .../HelpSteer3 (preference).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.conversations import as_text, messages_in, noted_chat
from rlhf.feedback.formats.form import Options, imported, noted, ranks_by
from rlhf.feedback.judgments import Judgment

NEITHER = -100


def read_2(row: Row, options: Options) -> Iterator[Judgment]:
    """`prompt`, `response_1`, `response_2`, `preference_strength`, `all_preferences_unprocessed`."""
    kept = row.fields.get("all_preferences_unprocessed") or []
    given = [(each["strength"], each.get("justification") or "") for each in kept]
    whole = (row.fields.get("preference_strength"), row.fields.get("preference_statement") or "")
    texts = (row.text("response_1"), row.text("response_2"))
    metadata = noted(row.fields, "split")
    yield from _judgments(row, options, given or [whole], texts, prompt=row.text("prompt"), metadata=metadata)


def read_3(row: Row, options: Options) -> Iterator[Judgment]:
    """`context` of messages, `response1`, `response2`, `overall_preference`, `individual_preference`."""
    chat = messages_in(row, row.fields.get("context"))
    kept: Sequence[Mapping[str, Any]] = row.fields.get("individual_preference") or []
    given = [(each["score"], each.get("reasoning") or "") for each in kept]
    texts = (row.text("response1"), row.text("response2"))
    metadata = noted(row.fields, "domain", "language")
    metadata |= noted_chat(chat, [[{"role": "assistant", "content": text}] for text in texts])
    whole = (row.fields.get("overall_preference"), "")
    yield from _judgments(row, options, given or [whole], texts, prompt=as_text(chat), metadata=metadata)


def _judgments(
    row: Row, options: Options, given: Sequence[tuple[Any, str]], texts: Sequence[str], **about: Any
) -> Iterator[Judgment]:
    for number, (score, reason) in enumerate(given):
        if score == NEITHER:
            continue
        if not isinstance(score, int) or not -3 <= score <= 3:
            raise row.error(f"a preference must be a whole number from -3 to 3, not {score!r}")
        ranks = ranks_by([-score, score])
        yield imported(row, options, texts, ranks, number=number, strength=abs(score), reason=reason, **about)
