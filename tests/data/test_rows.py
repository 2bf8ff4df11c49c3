"""Every kind of source is read, and every kind of bad row is refused with its file and line."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.rows import Row, read_rows, write_rows
from rlhf.errors import DataError, StorageError

ROWS = [{"text": "one"}, {"text": "zwei — 二", "n": 2}]


def test_what_is_written_is_read_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert write_rows(path, ROWS) == 2
    assert list(read_rows(path)) == [Row(ROWS[0], str(path), 1), Row(ROWS[1], str(path), 2)]
    assert list(path.parent.iterdir()) == [path]


def test_gzip_parquet_and_folder_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "one"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["two", "three"]}), tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    rows = list(read_rows(str(tmp_path)))
    assert [(row.fields["text"], Path(row.path).name, row.line) for row in rows] == [
        ("one", "a.jsonl.gz", 1),
        ("two", "b.parquet", 1),
        ("three", "b.parquet", 2),
    ]


def test_rows_of_parquet_are_numbered_across_batches(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(1, 2501))}), tmp_path / "n.parquet")
    assert all(row.fields["n"] == row.line for row in read_rows(tmp_path / "n.parquet"))


def test_byte_order_mark_windows_line_ends_and_odd_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n{"text": "c"}'.encode())
    assert [row.fields["text"] for row in read_rows(path)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "the line is empty"),
        (b"  \t", "the line is empty"),
        (b'{"text": "cut', "malformed JSON"),
        (b'{"text": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"text": "caf\xe9"}', "byte 14 of the line is not UTF-8"),
        (b'["text"]', "a JSON object is expected"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert said in str(caught.value)


def test_broken_containers_are_data_errors(tmp_path: Path) -> None:
    parquet, zipped = tmp_path / "rows.parquet", tmp_path / "rows.jsonl.gz"
    parquet.write_bytes(b"PAR1 and nothing else")
    zipped.write_bytes(gzip.compress(b'{"text": "one"}\n' * 100)[:-12])
    for path in (parquet, zipped):
        with pytest.raises(DataError, match=path.name):
            list(read_rows(path))


def test_no_rows_no_file_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "table.csv").write_text("text\none\n")
    with pytest.raises(DataError, match="holds no rows"):
        list(read_rows(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(str(tmp_path / "missing.jsonl")))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(Path("a_path_is_no_name_of_a_dataset")))
    with pytest.raises(DataError, match=r"is none of \.jsonl"):
        list(read_rows(tmp_path / "table.csv"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"other": 1}, 'field "text" is missing; the row has "other"'),
        ({"text": 1}, "must be a string"),
        ({"text": None}, "must be a string"),
        ({"text": " \n"}, "is empty"),
        ({"text": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_field_that_is_no_text_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        Row(fields, "file.jsonl", 7).text("text")
    assert str(caught.value).startswith("file.jsonl:7: ")
    assert said in str(caught.value)


def test_a_bool_is_no_number() -> None:
    with pytest.raises(DataError, match="must be a whole number, not True"):
        Row({"n": True}, "file.jsonl", 1).require("n", int, "a whole number")


def test_dataset_folders_of_the_hugging_face_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    train, test = datasets.Dataset.from_list([{"text": "one"}]), datasets.Dataset.from_list([{"text": "two"}])
    train.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "several"))
    assert [row.fields for row in read_rows(tmp_path / "single")] == [{"text": "one"}]
    assert [row.fields for row in read_rows(tmp_path / "several")] == [{"text": "one"}]
    monkeypatch.chdir(tmp_path)
    assert [row.fields for row in read_rows("several:default:test")] == [{"text": "two"}]


def test_a_dataset_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    """In its own process, because the library reads its offline switch once."""
    code = "from rlhf.data.rows import read_rows; list(read_rows('nobody/no-such-dataset'))"
    roots = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": roots, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError: nobody/no-such-dataset: neither a file here nor a dataset that can be loaded" in last


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_rows(path, [{"text": "new"}])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == ROWS
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_that_json_cannot_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(tmp_path / "rows.jsonl", [{"score": float("nan")}])
    assert list(tmp_path.iterdir()) == []


def test_a_json_array_is_rows_and_what_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 2, {"a": 3}]')
    refused: list[DataError] = []
    assert [row.fields for row in read_rows(path, refused.append)] == [{"a": 1}, {"a": 3}]
    assert [str(error) for error in refused] == [f"{path}:2: a JSON object is expected, not 2"]
    with pytest.raises(DataError, match=r"rows\.json:2: "):
        list(read_rows(path))
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="an array of objects is expected"):
        list(read_rows(path))


def test_what_says_something_about_a_folder_is_none_of_its_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    (tmp_path / "about.json").write_text('[{"b": 2}]')
    assert [row.fields for row in read_rows(tmp_path)] == [{"a": 1}]


def test_gzipped_rows_are_equal_bytes_for_equal_rows(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for path in files:
        assert write_rows(path, [{"a": "ü"}]) == 1
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row.fields for row in read_rows(files[0])] == [{"a": "ü"}]
    with pytest.raises(DataError, match="can only be written as"):
        write_rows(tmp_path / "a.txt", [{"a": 1}])
