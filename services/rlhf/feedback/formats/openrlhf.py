"""OpenRLHF: TRL's explicit form under the names of --data.prompt_key, --data.chosen_key and --data.rejected_key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats import trl
from rlhf.feedback.formats.form import Options
from rlhf.feedback.judgments import Judgment


def read(row: Row, options: Options) -> Iterator[Judgment]:
    keys = {"prompt": options.prompt_key, "chosen": options.chosen_key, "rejected": options.rejected_key}
    fields = {name: row.require(key, (str, list), "a text or messages") for name, key in keys.items()}
    return trl.read(Row({**row.fields, **fields}, row.path, row.line), options)


def write(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    names = {"prompt": options.prompt_key, "chosen": options.chosen_key, "rejected": options.rejected_key}
    for row in trl.write_explicit(judgments, options):
        yield {names.get(name, name): value for name, value in row.items()}
