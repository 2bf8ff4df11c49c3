"""UltraFeedback: raw ratings of several models, its binarized forms by Hugging Face H4 and by Argilla. Only read.

The raters are models; equal scores are ties. Sources: https://huggingface.co/datasets/openbmb/UltraFeedback,
HuggingFaceH4/ultrafeedback_binarized, argilla/ultrafeedback-binarized-preferences.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.data.rows import Row
from rlhf.feedback.formats.conversations import as_text, messages_in, noted_chat, reply_text
from rlhf.feedback.formats.form import Options, as_json, imported, noted, ranks_by
from rlhf.feedback.judgments import Judgment


def read_raw(row: Row, options: Options) -> Iterator[Judgment]:
    completions = row.require("completions", list, "a list of completions")
    scores = [float(each["overall_score"]) for each in completions]
    metadata = noted(row.fields, "source") | {"policies": as_json([each.get("model") for each in completions])}
    metadata |= {"scores": as_json(scores)}
    texts = [each["response"] for each in completions]
    yield imported(row, options, texts, ranks_by(scores), prompt=row.text("instruction"), metadata=metadata)


def read_binarized(row: Row, options: Options) -> Iterator[Judgment]:
    chosen, rejected = (messages_in(row, row.fields.get(name)) for name in ("chosen", "rejected"))
    # The dialogues repeat the prompt; all but the last message is shared.
    if chosen[:-1] != rejected[:-1]:
        raise row.error('"chosen" and "rejected" must differ in their last message alone')
    scores = [float(row.fields["score_chosen"]), float(row.fields["score_rejected"])]
    metadata = noted(row.fields, "prompt_id") | {"scores": as_json(scores)}
    if len(chosen) > 2:
        metadata |= noted_chat(chosen[:-1], [chosen[-1:], rejected[-1:]])
    prompt = as_text(chosen[:-1]) if len(chosen) > 2 else row.text("prompt")
    replies = (reply_text(chosen[-1:]), reply_text(rejected[-1:]))
    yield imported(row, options, replies, ranks_by(scores), prompt=prompt, metadata=metadata)


def read_argilla(row: Row, options: Options) -> Iterator[Judgment]:
    texts = (row.text("chosen_response"), row.text("rejected_response"))
    ratings = [float(row.fields[f"{name}_avg_rating"]) for name in ("chosen", "rejected")]
    metadata = noted(row.fields, "source", "chosen_model", "rejected_model") | {"scores": as_json(ratings)}
    yield imported(row, options, texts, ranks_by(ratings), prompt=row.text("instruction"), metadata=metadata)
