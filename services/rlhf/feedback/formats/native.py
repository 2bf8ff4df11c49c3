"""The native form: `rlhf.feedback.judgments`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.form import Options
from rlhf.feedback.judgments import Judgment, judgment_from_row


def read(row: Row, options: Options) -> Iterator[Judgment]:
    yield judgment_from_row(row)


def write(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    return map(asdict, judgments)
