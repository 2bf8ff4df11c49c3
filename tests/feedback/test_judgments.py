"""The native form: what is written is read back equal from every kind of file, and altered rows are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.data.rows import write_rows
from rlhf.errors import DataError
from rlhf.feedback.judgments import CompletionShown, Judgment, problem_of, read_judgments, write_judgments

FULL = Judgment(
    judgment_id="7/ann/1",
    task_id="7",
    prompt="The film\u2028 was",
    metadata={"topic": "plot", "line": "ünï"},
    completions=(
        CompletionShown(" fine.", "c1", "demo/0-40/abababab", {"temperature": 0.7, "top_k": 50}),
        CompletionShown("", "c2", "demo/0-0/cdcdcdcd", {"temperature": 1.0}),
    ),
    ranks=(2, 1),
    order_shown=(1, 0),
    annotator="ann",
    source="active",
    p_select=0.25,
    strength=3,
    flags=("all-bad", "unsafe"),
    reason='both "bad"',
    ms_visible=8120,
    guideline_version="2",
    revision=1,
    created_at="2026-11-20T10:11:12+00:00",
)
PLAIN = Judgment(
    judgment_id="8/bob",
    task_id="8",
    prompt="A song",
    completions=tuple(map(CompletionShown, "abc")),
    ranks=(2, 1, 2),
    annotator="bob",
    source="random",
)


@pytest.mark.parametrize("name", ["j.jsonl", "j.jsonl.gz", "j.parquet"])
def test_judgments_survive_every_kind_of_file(tmp_path: Path, name: str) -> None:
    assert write_judgments(tmp_path / name, [FULL, PLAIN]) == 2
    read = read_judgments(tmp_path / name)
    assert read == [FULL, PLAIN]
    assert type(read[0].completions[0].sampling["top_k"]) is int
    first = (tmp_path / name).read_bytes()
    write_judgments(tmp_path / name, [FULL, PLAIN])
    assert (tmp_path / name).read_bytes() == first


def test_a_parquet_file_whose_optional_fields_are_all_empty_can_be_read(tmp_path: Path) -> None:
    write_judgments(tmp_path / "j.parquet", [PLAIN])
    assert read_judgments(tmp_path / "j.parquet") == [PLAIN]


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.jsonl or \.jsonl\.gz"):
        write_judgments(tmp_path / "j.csv", [PLAIN])


def test_the_prompts_text_names_the_prompt_unless_it_has_a_name() -> None:
    assert PLAIN.prompt_id == replace(FULL, prompt="A song", prompt_id="").prompt_id != FULL.prompt_id
    assert replace(PLAIN, prompt_id="mine").prompt_id == "mine"


def test_the_policy_version_is_the_one_that_all_share() -> None:
    assert FULL.policy_version == "mixed"
    assert PLAIN.policy_version == ""
    assert replace(FULL, completions=(FULL.completions[0],) * 2).policy_version == "demo/0-40/abababab"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ranks", [1], "must hold 2 whole numbers"),
        ("ranks", [0, 1], "must hold 2 whole numbers"),
        ("ranks", [2, 2], "must hold 2 whole numbers"),
        ("ranks", [1, 1.5], "only whole numbers"),
        ("ranks", [True, 2], "only whole numbers"),
        ("order_shown", [1, 1], "each of 0 to 1 once"),
        ("completions", [{"text": "a"}], "at least two"),
        ("completions", ["a", 2], "objects of"),
        ("completions", [{"text": "a"}, {"text": "b", "heat": 1}], "objects of"),
        ("completions", [{"text": "a"}, {"text": "b", "id": 3}], "must be strings"),
        ("completions", [{"text": "a"}, {"text": "b", "sampling": {"heat": "high"}}], "only numbers"),
        ("metadata", {"n": 1}, "only strings"),
        ("metadata", "{", "an object of strings"),
        ("annotator", "", "is empty"),
        ("prompt", " ", "is empty"),
        ("source", "guess", "must be one of random, active"),
        ("p_select", 0, "above 0"),
        ("p_select", "often", "a number or null"),
        ("strength", 4, "0 to 3"),
        ("flags", "bad", "a list of strings"),
        ("flags", [1], "a list of strings"),
        ("ms_visible", -1, "not be negative"),
        ("revision", -1, "not be negative"),
        ("created_at", "yesterday", "ISO 8601"),
        ("created_at", "2026-11-20T10:11:12+02:00", "in UTC"),
    ],
)
def test_an_altered_judgment_is_refused_or_skipped(tmp_path: Path, name: str, value: object, said: str) -> None:
    path = tmp_path / "j.jsonl"
    write_judgments(path, [FULL])
    good = json.loads(path.read_text())
    write_rows(path, [good, good | {name: value}])
    with pytest.raises(DataError) as caught:
        read_judgments(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert said in str(caught.value)
    assert read_judgments(path, on_bad="skip") == [FULL]


def test_strength_is_for_two() -> None:
    assert "for two completions" in problem_of(replace(PLAIN, strength=1))
    assert problem_of(PLAIN) == problem_of(FULL) == ""


def test_a_skipped_line_that_is_no_json_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "j.jsonl"
    write_judgments(path, [PLAIN, FULL])
    first, second = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    path.write_text(f"{first}\n{{oops\n{second}\n", encoding="utf-8")
    assert read_judgments(path, on_bad="skip") == [PLAIN, FULL]
    assert f"{path}:2: malformed JSON" in caplog.text
    path.write_text("{oops\n")
    with pytest.raises(DataError, match="holds no"):
        read_judgments(path, on_bad="skip")


def test_the_form_before_this_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    row = {
        "judgment_id": "3/simulated-0",
        "prompt_index": 3,
        "prompt": "The film",
        "metadata": {"topic": "plot"},
        "completions": ["a", "b", "c"],
        "ranks": [2, 1, 2],
        "annotator": "simulated-0",
        "order_shown": [2, 0, 1],
        "policy_version": "demo/0-0/abababab",
    }
    write_rows(path, [row])
    [read] = read_judgments(path)
    assert (read.judgment_id, read.task_id, read.source) == ("3/simulated-0", "3", "simulated")
    assert (read.texts, read.ranks, read.order_shown) == (("a", "b", "c"), (2, 1, 2), (2, 0, 1))
    assert (read.metadata, read.policy_version) == ({"topic": "plot"}, "demo/0-0/abababab")


def test_pairs_are_rankings_of_two_and_share_the_name_of_their_prompt(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "The film", "chosen": " is good", "rejected": " is bad"}
    write_rows(path, [pair, pair | {"prompt": "A song"}, pair | {"rejected": " is long"}])
    first, second, third = read_judgments(path)
    assert (first.texts, first.ranks, first.order_shown) == ((" is good", " is bad"), (1, 2), ())
    assert first.prompt_id == third.prompt_id != second.prompt_id
    assert first.policy_version == "unknown:pairs.jsonl"
    assert len({j.judgment_id for j in (first, second, third)}) == 3
