"""What a format is, and what several of them are made with.

A format holds judgments in its own fields. What those have no place for goes, where the format leaves room for anything
(OpenAI's `extra`, Argilla's `metadata`, Label Studio's `meta`), into an object named `native`, so that it comes back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf.data.rows import Refuse, Row
from rlhf.feedback.judgments import UNKNOWN_ANNOTATOR, CompletionShown, Judgment, judgment_from_row

NATIVE = "native"


@dataclass(frozen=True)
class Options:
    """What a format may be told."""

    dataset: str = ""
    """Names the imported rows and, as "unknown:<dataset>", whose completions they are."""
    prompt_key: str = "prompt"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    tokenizer: Path | None = None
    """Folder of the tokenizer, for formats that hold token ids."""


def as_they_are(rows: Iterator[Row], refuse: Refuse) -> Iterator[Row]:
    return rows


@dataclass(frozen=True)
class Format:
    about: str
    """One line for people."""
    read: Callable[[Row, Options], Iterable[Judgment]] | None = None
    """Judgments of one row. Raises DataError, or whatever a row of another form makes Python raise."""
    write: Callable[[Sequence[Judgment], Options], Iterator[dict[str, Any]]] | None = None
    gather: Callable[[Iterator[Row], Refuse], Iterator[Row]] = as_they_are
    """Makes one row of those that tell of one judgment together."""


def imported(
    row: Row, options: Options, texts: Iterable[str], ranks: Iterable[int], *, number: int = 0, **given: Any
) -> Judgment:
    """A judgment of the row, with what the data does not say left unknown.

    Args:
        number: which judgment of the row this is.
        given: other fields of Judgment.
    """
    file = Path(row.path).name
    place = f"{options.dataset}:{row.line}" if file.split(".")[0] == options.dataset else f"{file}:{row.line}"
    name = place if place.startswith(options.dataset) else f"{options.dataset}/{place}"
    version = f"unknown:{options.dataset}"
    return Judgment(
        **{"judgment_id": f"{name}/{number}", "task_id": name, "annotator": UNKNOWN_ANNOTATOR, **given},
        completions=tuple(CompletionShown(text, policy_version=version) for text in texts),
        ranks=tuple(ranks),
        source="imported",
    )


def ranks_by(scores: Sequence[float]) -> tuple[int, ...]:
    """[K], the highest score first; equal scores are a tie."""
    return tuple(1 + sum(other > own for other in scores) for own in scores)


def ordered(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(better, worse) of every pair that is no tie."""
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            yield (i, j) if ranks[i] < ranks[j] else (j, i)


def dense(ranks: Sequence[int]) -> tuple[int, ...]:
    """The same order without gaps: 1, 1, 3 becomes 1, 1, 2."""
    levels = sorted(set(ranks))
    return tuple(levels.index(rank) + 1 for rank in ranks)


def shared_start(first: str, second: str) -> str:
    pairs = zip(first, second, strict=False)
    return first[: next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))]


def noted(fields: Mapping[str, Any], *names: str) -> dict[str, str]:
    """Those of the fields that are there, as metadata: texts as they are, all else as JSON."""
    found = {name: fields[name] for name in names if fields.get(name) is not None}
    return {name: value if isinstance(value, str) else as_json(value) for name, value in found.items()}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def margins(judgments: Sequence[Judgment]) -> Callable[[Judgment], dict[str, float]]:
    """The margin's column for one of these judgments: its strength, or none where not all of them have one."""
    if all(judgment.strength is not None for judgment in judgments):
        return lambda judgment: {"margin": float(judgment.strength or 0)}
    return lambda judgment: {}


def provenance(judgment: Judgment, *held: str) -> dict[str, Any]:
    """All but the texts, the ranks and the fields that the format holds itself."""
    fields = {name: value for name, value in asdict(judgment).items() if name not in (*held, "prompt", "ranks")}
    fields["completions"] = [{k: v for k, v in each.items() if k != "text"} for each in fields["completions"]]
    return fields


def restored(row: Row, native: Mapping[str, Any], prompt: str, texts: Sequence[str], **held: Any) -> Judgment:
    """What `provenance` kept, put together with what the format holds.

    Raises:
        DataError: they do not fit together.
    """
    shown = native.get("completions")
    if not isinstance(shown, list) or len(shown) != len(texts) or not all(isinstance(each, dict) for each in shown):
        raise row.error(f'"{NATIVE}" tells of other completions than the {len(texts)} of the row; remove it or mend it')
    completions = [{**each, "text": text} for each, text in zip(shown, texts, strict=True)]
    return judgment_from_row(Row({**native, "prompt": prompt, "completions": completions, **held}, row.path, row.line))


def pair_of(judgment: Judgment, better: int, worse: int) -> Judgment:
    """Two completions of a longer ranking as a judgment of their own, in the order in which they lie."""
    if len(judgment.completions) == 2:
        return judgment
    first, second = sorted((better, worse))
    fields = {name: getattr(judgment, name) for name in judgment.__dataclass_fields__}
    seen = [index for index in judgment.order_shown if index in (first, second)]
    return Judgment(
        **{
            **fields,
            "judgment_id": f"{judgment.judgment_id}/{first}-{second}",
            "completions": (judgment.completions[first], judgment.completions[second]),
            "ranks": (1, 2) if better == first else (2, 1),
            "order_shown": tuple((first, second).index(index) for index in seen),
        }
    )
