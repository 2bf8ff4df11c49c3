"""Judgments from files of other tools and data sets, and to them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.data.rows import Row, read_rows, write_json, write_parquet, write_rows
from rlhf.errors import DataError, RlhfError, first_line
from rlhf.feedback.formats.form import Format, Options, ordered
from rlhf.feedback.formats.table import format_named
from rlhf.feedback.judgments import (
    UNKNOWN_ANNOTATOR,
    BadRows,
    Judgment,
    OnBad,
    as_columns,
    checked,
    columns,
    write_judgments,
)
from rlhf.models.folders import replacing_folder


@dataclass(frozen=True)
class Import:
    judgments: tuple[Judgment, ...]
    bad: tuple[DataError, ...]
    """Rows that were left out, each with file and line."""
    duplicates: int
    """Judgments that another row had already given."""


def import_judgments(
    source: str | Path, format_name: str, options: Options | None = None, on_bad: OnBad = "stop"
) -> Import:
    """Reads a file, a folder or a Hugging Face data set, whatever form its rows have.

    A judgment is a duplicate if prompt (by hash), completions, ranks and annotator are those of an earlier row. One
    that has its own provenance, as in the native form, is none.

    Args:
        source: as `rlhf.data.rows.read_rows` takes it.
        options: an empty `dataset` becomes the source's name.

    Raises:
        SettingsError: no such format.
        DataError: a bad row, unless these are skipped; or nothing to import.
    """
    form = format_named(format_name, to="read")
    options = options or Options()
    options = options if options.dataset else replace(options, dataset=dataset_of(source))
    bad = BadRows(on_bad)
    found = _judgments(form, form.gather(read_rows(source, bad), bad), options, format_name, bad)
    whole = list(found)
    kept = [judgment for judgment, _ in whole] if format_name == "native" else list(_distinct(whole))
    if not kept:
        raise DataError(f"holds no judgments in the form {format_name}; {len(bad.errors)} bad rows", path=source)
    return Import(tuple(kept), tuple(bad.errors), len(whole) - len(kept))


def dataset_of(source: str | Path) -> str:
    """`hh` for a/b/hh.jsonl.gz; `Anthropic/hh-rlhf` for itself with a split or without."""
    return Path(source).name.split(".")[0] if Path(source).exists() else str(source).partition(":")[0]


def export_judgments(
    path: Path, judgments: Sequence[Judgment], format_name: str, options: Options | None = None, sha256: str = ""
) -> int:
    """Writes `.jsonl`, `.jsonl.gz`, `.parquet`, `.json` (for tools that read nothing else) or, without an ending,
    a folder for `datasets.load_from_disk`; returns the number of rows.

    Beside it goes `<path>.card.md`, which says what was derived from what.

    Raises:
        SettingsError: no such format.
        DataError: the format can hold none of the judgments, or the file's name has another ending.
    """
    form = format_named(format_name, to="write")
    assert form.write is not None
    if format_name != "native":
        rows = _write(path, list(form.write(judgments, options or Options())))
    elif not path.suffix:
        rows = _write_dataset(path, list(map(as_columns, judgments)), columns())
    else:
        rows = write_judgments(path, judgments)
    card = path.with_name(path.name + ".card.md")
    card.write_text(_card(path, judgments, form, rows, sha256), encoding="utf-8")
    return rows


def _judgments(
    form: Format, rows: Iterable[Row], options: Options, name: str, bad: BadRows
) -> Iterator[tuple[Judgment, int]]:
    """Each with its place among the row's own. A row with one bad judgment gives none."""
    assert form.read is not None
    for row in rows:
        try:
            found = [_encodable(checked(judgment, row), row) for judgment in form.read(row, options)]
        except DataError as error:
            bad(error)
        except RlhfError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
            said = f"there is no {error}" if isinstance(error, KeyError) else first_line(error)
            bad(row.error(f"is no row in the form {name}: {said}"))
        else:
            yield from ((judgment, number) for number, judgment in enumerate(found))


def _encodable(judgment: Judgment, row: Row) -> Judgment:
    try:
        json.dumps(asdict(judgment), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise row.error(f"cannot be kept as UTF-8 JSON: {first_line(error)}") from error
    return judgment


def _distinct(judgments: Iterable[tuple[Judgment, int]]) -> Iterator[Judgment]:
    seen: set[Hashable] = set()
    for judgment, number in judgments:
        # What brings its provenance along brings its own id; an annotator may well have been asked twice.
        own = "" if judgment.source == "imported" else judgment.judgment_id
        # Those without a name are different people within a row, where equal answers are no duplicates.
        who = (judgment.annotator, number if judgment.annotator == UNKNOWN_ANNOTATOR else 0)
        key = (judgment.prompt_id, judgment.texts, judgment.ranks, who, own)
        if key not in seen:
            seen.add(key)
            yield judgment


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    if not rows:
        raise DataError("would hold nothing: there is no judgment that this format can hold", path=path)
    if path.name.endswith(".parquet"):
        return write_parquet(path, rows)
    if not path.suffix:
        return _write_dataset(path, rows)
    return write_json(path, rows) if path.suffix == ".json" else write_rows(path, rows)


def _write_dataset(folder: Path, rows: Sequence[Mapping[str, Any]], schema: Any = None) -> int:
    import datasets
    import pyarrow

    table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema)
    with replacing_folder(folder) as tmp:
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(tmp))
    return len(rows)


def _card(path: Path, judgments: Sequence[Judgment], form: Format, rows: int, sha256: str) -> str:
    pairs = sum(len(each.ranks) * (len(each.ranks) - 1) // 2 for each in judgments)
    ties = pairs - sum(1 for each in judgments for _ in ordered(each.ranks))
    return CARD.format(
        name=path.name, about=form.about, rows=rows, judgments=len(judgments), sha256=sha256, pairs=pairs, ties=ties
    )


CARD = """\
# {name}

{about}. {rows} rows from {judgments} judgments of the snapshot {sha256}.

- The judgments hold {pairs} pairs of completions, {ties} of them ties. Forms that hold whole rankings keep ties; forms
  of pairs leave them out.
- Forms of pairs have one row for every ordered pair, all of equal weight: a ranking of K without ties counts
  K(K - 1)/2 times.
- Every annotator's judgment is its own rows; nothing was averaged or voted on.
"""
