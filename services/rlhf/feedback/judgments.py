"""Judgments: one annotator's ranking of one prompt's completions a row, raw and with its provenance.

The native form, of the annotation page, simulated annotators, imports and the trainer alike. Pairs, votes and consensus
are derived from it, never stored in its place. Files of the form before this one, and rows of `prompt`, `chosen` and
`rejected`, are read too; every other format is in `rlhf.feedback.formats`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rlhf.data.rows import Row, read_rows, write_parquet, write_rows
from rlhf.errors import DataError

Source = Literal["random", "active", "gold", "repeat", "audit", "imported", "simulated"]
OnBad = Literal["stop", "skip"]
SOURCES: tuple[str, ...] = get_args(Source)
UNKNOWN_ANNOTATOR = "unknown"
GOLD_RANKS = "gold_ranks"
"""Key of a gold judgment's metadata: the experts' ranks as JSON, such as "[1, 2, 2]"."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletionShown:
    """One of the completions that an annotator compared."""

    text: str
    id: str = ""
    """Of whoever made it; empty where it has none."""
    policy_version: str = ""
    """The weights that wrote it (`str` of a WeightVersion), or "unknown:<data set>": an import never invents one."""
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    """Temperature and the like; empty where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """One annotator's ranking; later revisions of it are rows of their own, with the same `judgment_id`'s task."""

    judgment_id: str
    """Unique among all rows."""
    task_id: str
    """What was asked; judgments of several annotators, and an annotator's revisions, share it."""
    prompt_id: str = ""
    """Judgments of one prompt stay on one side of every split. Left empty, it becomes `prompt_id_of(prompt)`."""
    prompt: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the prompt; what an import cannot place elsewhere is here, under the names of its format."""
    completions: tuple[CompletionShown, ...]
    """[K], K ≥ 2."""
    ranks: tuple[int, ...]
    """[K], 1 = best; equal ranks are a tie."""
    order_shown: tuple[int, ...] = ()
    """[K], indices into `completions` in the order in which the annotator saw them; empty where it is not known."""
    annotator: str
    """Pseudonym; "unknown" where the data has none."""
    source: Source
    """Why this was asked."""
    p_select: float | None = None
    """Probability with which the task was selected, in (0, 1]; None: not known."""
    strength: int | None = None
    """How much better the better of two is, 0 (a tie, or no difference felt) to 3; None: not asked, or K > 2."""
    flags: tuple[str, ...] = ()
    """What the annotator marked, such as "all-bad"."""
    reason: str = ""
    """In the annotator's words."""
    ms_visible: int | None = None
    """How long the task was before the annotator's eyes; None: not known."""
    guideline_version: str = ""
    revision: int = 0
    """Counts from 0; the highest of an annotator's judgments of one task is the one that holds."""
    created_at: str = ""
    """ISO 8601 in UTC; empty where it is not known."""

    def __post_init__(self) -> None:
        if not self.prompt_id:
            object.__setattr__(self, "prompt_id", prompt_id_of(self.prompt))

    @property
    def texts(self) -> tuple[str, ...]:
        """[K]"""
        return tuple(completion.text for completion in self.completions)

    @property
    def policy_version(self) -> str:
        """The one that all completions share, "mixed" where they do not."""
        versions = {completion.policy_version for completion in self.completions}
        return versions.pop() if len(versions) == 1 else "mixed"


def prompt_id_of(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]


def write_judgments(path: Path, judgments: Iterable[Judgment]) -> int:
    """Writes `.jsonl`, `.jsonl.gz` or `.parquet`, equal bytes for equal judgments, and returns the number of rows.

    In Parquet the fields without a fixed set of names, `metadata` and `sampling`, are JSON texts.

    Raises:
        DataError: the name ends in none of these.
        StorageError: as `write_rows`.
    """
    if path.name.endswith(".parquet"):
        return write_parquet(path, map(as_columns, judgments), columns())
    return write_rows(path, map(asdict, judgments))


def read_judgments(source: str | Path, on_bad: OnBad = "stop") -> list[Judgment]:
    """What `write_judgments` wrote, the form before it, or rows of `prompt`, `chosen` and `rejected` strings.

    Args:
        source: as `rlhf.data.rows.read_rows` takes it.
        on_bad: "skip" logs a bad row, with its file and line, and goes on.

    Raises:
        DataError: a bad row; names file and line. Also if none is good.
    """
    bad = BadRows(on_bad)
    judgments = []
    for row in read_rows(source, bad):
        try:
            judgments.append(judgment_from_row(row))
        except DataError as error:
            bad(error)
    if not judgments:
        raise DataError(f"holds no judgments that can be used; {len(bad.errors)} rows cannot", path=source)
    return judgments


class BadRows:
    """What happens to rows that cannot be used, and which they were."""

    def __init__(self, on_bad: OnBad) -> None:
        self.on_bad = on_bad
        self.errors: list[DataError] = []

    def __call__(self, error: DataError) -> None:
        """
        Raises:
            DataError: this one, if bad rows stop the reading.
        """
        if self.on_bad == "stop":
            raise error
        _log.warning("left out: %s", error)
        self.errors.append(error)


def judgment_from_row(row: Row) -> Judgment:
    """
    Raises:
        DataError: the row is in none of the forms that `read_judgments` knows; names file and line.
    """
    is_pair = "chosen" in row.fields and "ranks" not in row.fields
    return checked(_from_pair(row) if is_pair else _from_row(row), row)


def checked(judgment: Judgment, row: Row) -> Judgment:
    """The judgment, or DataError with the row's place if it breaks a rule."""
    problem = problem_of(judgment)
    if problem:
        raise row.error(problem)
    return judgment


def problem_of(judgment: Judgment) -> str:
    """What is wrong with the values, as a sentence; empty if nothing is."""
    count = len(judgment.completions)
    order, strength, p_select = judgment.order_shown, judgment.strength, judgment.p_select
    rules = {
        f"a ranking needs at least two completions, {count} given": count < 2,
        'field "prompt" is empty': not judgment.prompt.strip(),
        'field "annotator" is empty': not judgment.annotator.strip(),
        f'field "ranks" must hold {count} whole numbers from 1 (best) on, not {list(judgment.ranks)}': (
            len(judgment.ranks) != count or min(judgment.ranks, default=0) != 1
        ),
        f'field "order_shown" must hold each of 0 to {count - 1} once, not {list(order)}': (
            bool(order) and sorted(order) != list(range(count))
        ),
        f'field "source" must be one of {", ".join(SOURCES)}, not {judgment.source!r}': judgment.source not in SOURCES,
        f'field "p_select" must be above 0 and at most 1, not {p_select}': (
            p_select is not None and not 0 < p_select <= 1
        ),
        f'field "strength" must be 0 to 3 and is for two completions, not {strength} for {count}': (
            strength is not None and (count != 2 or not 0 <= strength <= 3)
        ),
        f'field "ms_visible" must not be negative, not {judgment.ms_visible}': (judgment.ms_visible or 0) < 0,
        f'field "revision" must not be negative, not {judgment.revision}': judgment.revision < 0,
        f'field "created_at" must be ISO 8601 in UTC, not {judgment.created_at!r}': not _is_utc(judgment.created_at),
    }
    return next((sentence for sentence, broken in rules.items() if broken), "")


def _is_utc(text: str) -> bool:
    try:
        return not text or datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _from_row(row: Row) -> Judgment:
    version = row.fields.get("policy_version", "")
    completions = row.require("completions", list, "a list of completions")
    return Judgment(
        judgment_id=row.text("judgment_id"),
        # The form before this one had a prompt's place in its file instead.
        task_id=str(row.require("prompt_index", int, "a whole number")) if _is_old(row) else row.text("task_id"),
        prompt_id=_optional(row, "prompt_id", str, "a string", ""),
        prompt=row.text("prompt"),
        metadata=_object(row, "metadata", row.fields.get("metadata", {}), str, "strings"),
        completions=tuple(_completion(row, each, str(version)) for each in completions),
        ranks=_whole_numbers(row, "ranks"),
        order_shown=_whole_numbers(row, "order_shown"),
        annotator=row.text("annotator"),
        source=_old_source(row) if _is_old(row) else cast(Source, row.text("source")),
        p_select=_optional(row, "p_select", (int, float), "a number or null", None),
        strength=_optional(row, "strength", int, "a whole number or null", None),
        flags=_flags(row),
        reason=_optional(row, "reason", str, "a string", ""),
        ms_visible=_optional(row, "ms_visible", int, "a whole number or null", None),
        guideline_version=_optional(row, "guideline_version", str, "a string", ""),
        revision=_optional(row, "revision", int, "a whole number", 0),
        created_at=_optional(row, "created_at", str, "a string", ""),
    )


def _is_old(row: Row) -> bool:
    return "prompt_index" in row.fields and "task_id" not in row.fields


def _old_source(row: Row) -> Source:
    """`rlhf rank` wrote those of its own annotators; of all others it is not known why they were asked."""
    return "simulated" if row.text("annotator").startswith(("simulated-", "noise-free")) else "imported"


def _completion(row: Row, value: object, version: str) -> CompletionShown:
    """
    Args:
        version: of a row whose completions are only texts.
    """
    if isinstance(value, str):
        return CompletionShown(row.encodable("completions", value), policy_version=version)
    known = {each.name for each in fields(CompletionShown)}
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str) or not value.keys() <= known:
        raise row.error('field "completions" must hold objects of "text", "id", "policy_version" and "sampling"')
    named = {name: value.get(name) or "" for name in ("id", "policy_version")}
    if not all(isinstance(text, str) for text in named.values()):
        raise row.error('"id" and "policy_version" of a completion must be strings')
    sampling = _object(row, "sampling", value.get("sampling") or {}, (int, float), "numbers")
    return CompletionShown(row.encodable("completions", value["text"]), sampling=sampling, **named)


def _from_pair(row: Row) -> Judgment:
    file = Path(row.path).name
    prompt, version, name = row.text("prompt"), f"unknown:{file}", f"{file}:{row.line}"
    texts = (row.text("chosen"), row.text("rejected"))
    return Judgment(
        judgment_id=name,
        task_id=name,
        prompt=prompt,
        completions=tuple(CompletionShown(text, policy_version=version) for text in texts),
        ranks=(1, 2),
        annotator=UNKNOWN_ANNOTATOR,
        source="imported",
    )


def _optional(row: Row, name: str, kind: type | tuple[type, ...], description: str, default: Any) -> Any:
    return default if row.fields.get(name) is None else row.require(name, kind, description)


def _flags(row: Row) -> tuple[str, ...]:
    values = _optional(row, "flags", list, "a list of strings", [])
    if not all(isinstance(value, str) for value in values):
        raise row.error(f'field "flags" must be a list of strings, not {values!r:.60}')
    return tuple(values)


def _whole_numbers(row: Row, name: str) -> tuple[int, ...]:
    values = row.require(name, list, "a list of whole numbers")
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise row.error(f'field "{name}" must hold only whole numbers')
    return tuple(values)


def _object(row: Row, name: str, value: object, kind: type | tuple[type, ...], named: str) -> dict[str, Any]:
    """An object, or the JSON text of one, as Parquet files have it."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise row.error(f'field "{name}" must be an object of {named}, not {value!r:.60}') from error
    if not isinstance(found, dict) or not all(isinstance(each, kind) for each in found.values()):
        raise row.error(f'field "{name}" must hold only {named}')
    return found


def as_columns(judgment: Judgment) -> dict[str, Any]:
    """The row as `columns` has it: fields without a fixed set of names are JSON texts."""
    fields = asdict(judgment)

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    shown = [{**each, "sampling": text(each["sampling"])} for each in fields["completions"]]
    return {**fields, "metadata": text(fields["metadata"]), "completions": shown}


def columns() -> Any:
    """The `pyarrow.Schema`, stated because Arrow would guess another where optional fields are all empty."""
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    completion = pa.struct([(each.name, text) for each in fields(CompletionShown)])
    others = {
        "completions": pa.list_(completion),
        "ranks": pa.list_(whole),
        "order_shown": pa.list_(whole),
        "p_select": pa.float64(),
        "strength": whole,
        "flags": pa.list_(text),
        "ms_visible": whole,
        "revision": whole,
    }
    return pa.schema([(each.name, others.get(each.name, text)) for each in fields(Judgment)])
