"""MultiPref: two completions, judged by two crowd workers and two experts each. Only read.

`overall_pref` is "A-is-clearly-better" (strength 2), "A-is-slightly-better" (1), "Tie" or the same of B.
Source: https://huggingface.co/datasets/allenai/multipref.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.form import Options, as_json, imported, noted
from rlhf.feedback.judgments import UNKNOWN_ANNOTATOR, Judgment

_WORKERS = ("normal_worker_annotations", "expert_worker_annotations")
_STRENGTHS = {"clearly": 2, "slightly": 1}


def read(row: Row, options: Options) -> Iterator[Judgment]:
    texts = [row.text(f"completion_{side}") for side in "ab"]
    metadata = noted(row.fields, "comparison_id", "source", "category")
    metadata |= {"policies": as_json([row.fields.get(f"model_{side}") for side in "ab"])}
    annotations = [(kind, each) for kind in _WORKERS for each in row.fields.get(kind) or []]
    for number, (kind, annotation) in enumerate(annotations):
        ranks, strength = _preference(row, annotation)
        beside = {"workers": kind.split("_")[0]} | noted(annotation, "overall_confidence")
        yield imported(
            row,
            options,
            texts,
            ranks,
            number=number,
            prompt=row.text("text"),
            metadata=metadata | beside,
            annotator=str(annotation.get("evaluator") or UNKNOWN_ANNOTATOR),
            strength=strength,
            ms_visible=_ms(annotation.get("time_spent")),
            created_at=_when(annotation.get("timestamp")),
        )


def _preference(row: Row, annotation: Mapping[str, Any]) -> tuple[tuple[int, int], int]:
    words = str(annotation.get("overall_pref")).lower().split("-")
    if words == ["tie"]:
        return (1, 1), 0
    if len(words) != 4 or words[0] not in ("a", "b") or words[2] not in _STRENGTHS:
        raise row.error(
            f'"overall_pref" must be such as "A-is-slightly-better", not {annotation.get("overall_pref")!r}'
        )
    return (1, 2) if words[0] == "a" else (2, 1), _STRENGTHS[words[2]]


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(float(seconds) * 1000)


def _when(stamp: str | float | None) -> str:
    """Seconds or milliseconds since 1970, or ISO 8601; in UTC where it names no zone."""
    if not stamp:
        return ""
    if isinstance(stamp, int | float):
        return datetime.fromtimestamp(stamp / 1000 if stamp > 1e11 else stamp, UTC).isoformat()
    found = datetime.fromisoformat(stamp)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
