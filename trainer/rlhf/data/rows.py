"""Rows of data files: JSON Lines (also gzipped), Parquet, JSON, folders of these, and Hugging Face datasets.

A row that cannot be used is a `DataError` that names the file and the line; nothing is skipped in silence. What the
fields mean is up to the readers of prompts, samples and judgments.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from rlhf.errors import DataError, StorageError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_DOCUMENT = ".json"
"""One array of objects. Only where it is named itself: in a folder of rows such a file says something about them."""
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]*){0,2}")
_READ_AT_ONCE = 1024


@dataclass(frozen=True)
class Row:
    """One row and where it came from."""

    fields: dict[str, Any]
    path: str
    """File, or name of the dataset."""
    line: int
    """1-based line of a JSON Lines file, 1-based row of a Parquet file, JSON array or dataset."""

    def error(self, message: str) -> DataError:
        return DataError(message, path=self.path, line=self.line)

    def require(self, name: str, kind: type | tuple[type, ...], description: str) -> Any:
        """The field, or DataError if it is missing or of another type. A bool is no number here."""
        if name not in self.fields:
            raise self.error(f'field "{name}" is missing; the row has {_listed(self.fields)}')
        value = self.fields[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f'field "{name}" must be {description}, not {_short(value)}')
        return value

    def text(self, name: str) -> str:
        """A string field that holds more than white space.

        Raises:
            DataError: missing, not a string, blank, or with half a surrogate pair, which no UTF-8 file can hold.
        """
        value = cast(str, self.require(name, str, "a string"))
        if not value.strip():
            raise self.error(f'field "{name}" is empty')
        return self.encodable(name, value)

    def encodable(self, name: str, value: str) -> str:
        """The string as it is, or DataError if it has half a surrogate pair."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(f'field "{name}" has half a surrogate pair (\\ud800 to \\udfff)') from error
        return value


Refuse = Callable[[DataError], None]
"""Is told of a row that cannot be read, and raises or lets the reading go on."""


def stop(error: DataError) -> None:
    """
    Raises:
        DataError: this one.
    """
    raise error


def is_data_file(source: str | Path) -> bool:
    """Whether this is the place of data, there or not, rather than the name of something else."""
    return Path(source).exists() or str(source).endswith((*_SUFFIXES, _DOCUMENT))


def read_rows(source: str | Path, refuse: Refuse = stop) -> Iterator[Row]:
    """Rows of a file, of all files in a folder in order of name, or of a Hugging Face dataset.

    Args:
        source: `*.jsonl`, `*.jsonl.gz`, `*.parquet`, `*.json`, a folder of these but the last, a folder that `datasets`
            can load, or the name of a dataset as "name", "name:config" or "name:config:split" (split "train" where none
            is named).
        refuse: is told of each line that is no JSON object.

    Raises:
        DataError: no such source, no rows in it, or what `refuse` raises; names file and line.
    """
    row = None
    for row in _rows_of(source, refuse):
        yield row
    if row is None:
        raise DataError("holds no rows", path=source)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes `.jsonl` or `.jsonl.gz`, equal bytes for equal rows.

    A reader sees the old file or the whole new one.

    Returns:
        The number of rows.

    Raises:
        DataError: the name ends in neither.
        StorageError: the disk is full, or the folder cannot be written; a file that was there stays as it was.
    """
    if path.name.endswith(".jsonl.gz"):
        return _replace(path, lambda file: _write_gzip(file, rows))
    if path.name.endswith(".jsonl"):
        return _replace(path, lambda file: _write_lines(file, rows))
    raise DataError("can only be written as .jsonl or .jsonl.gz", path=path)


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], schema: Any = None) -> int:
    """`write_rows` in Parquet, with this `pyarrow.Schema` or one that Arrow guesses from the rows."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema)
    return _replace(path, lambda file: (pyarrow.parquet.write_table(table, file), table.num_rows)[1])


def write_json(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """`write_rows` as one JSON array, for the tools that read nothing else."""
    listed = [dict(row) for row in rows]
    text = json.dumps(listed, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    return _replace(path, lambda file: (file.write(text.encode()), len(listed))[1])


def _replace(path: Path, write: Callable[[IO[bytes]], int]) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            count = write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; what was there is unchanged") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
    return count


def _write_gzip(file: IO[bytes], rows: Iterable[Mapping[str, Any]]) -> int:
    # No name and no time in the header, so that equal rows make equal bytes.
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        return _write_lines(packed, rows)


def _write_lines(file: IO[bytes] | gzip.GzipFile, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for row in rows:
        file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
        count += 1
    return count


def _rows_of(source: str | Path, refuse: Refuse) -> Iterator[Row]:
    path = Path(source)
    if path.is_file():
        return _file_rows(path, refuse)
    if path.is_dir():
        return _folder_rows(path, refuse)
    name = str(source)
    if isinstance(source, str) and not name.endswith((*_SUFFIXES, _DOCUMENT)) and _DATASET_NAME.fullmatch(name):
        return _dataset_rows(name)
    raise DataError("no such file or folder", path=source)


def _file_rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    if path.name.endswith(".jsonl.gz"):
        return _gzip_rows(path, refuse)
    if path.name.endswith(".jsonl"):
        return _plain_rows(path, refuse)
    if path.name.endswith(_DOCUMENT):
        return _document_rows(path, refuse)
    raise DataError(f"is none of {', '.join((*_SUFFIXES, _DOCUMENT))}", path=path)


def _folder_rows(folder: Path, refuse: Refuse) -> Iterator[Row]:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIXES) and path.is_file())
    if not files:
        yield from _dataset_rows(str(folder))
    for path in files:
        yield from _file_rows(path, refuse)


def _plain_rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            yield from _json_rows(file, path, refuse)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from error


def _gzip_rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _json_rows(file, path, refuse)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"is not a whole gzip file: {error}", path=path) from error


def _json_rows(file: Iterable[bytes], path: Path, refuse: Refuse) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        # Editors on Windows put a byte order mark in front of the first line.
        raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            fields = _parse_line(raw, path, number)
        except DataError as error:
            refuse(error)
        else:
            yield Row(fields, str(path), number)


def _document_rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_no_constant)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON: {error}", path=path) from error
    if not isinstance(document, list):
        raise DataError(f"an array of objects is expected, not {_short(document)}", path=path)
    for number, fields in enumerate(document, start=1):
        if isinstance(fields, dict):
            yield Row(fields, str(path), number)
        else:
            refuse(DataError(f"a JSON object is expected, not {_short(fields)}", path=path, line=number))


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """One line as an object. NaN and Infinity are no JSON, though Python's parser takes them."""
    if not line.strip():
        raise DataError("the line is empty", path=path, line=number)
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} of the line is not UTF-8", path=path, line=number) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON: {error}", path=path, line=number) from error
    if not isinstance(value, dict):
        raise DataError(f"a JSON object is expected, not {_short(value)}", path=path, line=number)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_READ_AT_ONCE):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, str(path), number)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow decodes strings when a batch becomes Python objects, so text that is not UTF-8 shows only here.
        raise DataError(f"cannot be read as Parquet after row {number}: {_one_line(error)}", path=path) from error


def _dataset_rows(name: str) -> Iterator[Row]:
    for number, fields in enumerate(_load_dataset(name), start=1):
        yield Row(dict(fields), name, number)


def _load_dataset(name: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    target, config, split = (name, "", "") if Path(name).is_dir() else (*name.split(":"), "", "")[:3]
    try:
        if Path(target, "state.json").is_file() or Path(target, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(target)
            loaded = loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(target, config or None, split=split or "train")
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"neither a file here nor a dataset that can be loaded: {_one_line(error)}", path=name
        ) from error
    return cast(Iterable[Mapping[str, Any]], loaded)


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in fields) or "no fields"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
