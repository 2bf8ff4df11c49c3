"""Token ids for trainers that take no text: `chosen_ids`, `rejected_ids`, `margin`. Only written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.errors import SettingsError
from rlhf.feedback.formats import trl
from rlhf.feedback.formats.form import Options
from rlhf.feedback.judgments import Judgment


def write(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    """Prompt and completion are encoded apart and end in one end token, as the reward model reads them.

    Raises:
        SettingsError: no tokenizer is named.
        ModelError: it cannot be loaded.
    """
    if options.tokenizer is None:
        raise SettingsError("feedback.tokenizer: token ids need the folder of a tokenizer")
    from rlhf.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    for row in trl.write_explicit(judgments, options):
        prompt = tokenizer(row.pop("prompt")).input_ids
        ids = {
            f"{name}_ids": [
                *prompt,
                *tokenizer(row.pop(name), add_special_tokens=False).input_ids,
                tokenizer.eos_token_id,
            ]
            for name in ("chosen", "rejected")
        }
        yield {**ids, **row}
