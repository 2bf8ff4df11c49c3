"""What is written is read back equal, and altered rows are refused with their line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.judgments import Judgment, read_judgments, write_judgments
from rlhf.data.rows import write_rows
from rlhf.data.samples import Sampled, SampledCompletion, read_samples, write_samples
from rlhf.errors import DataError
from rlhf.wire.records import FinishReason, Sampling, WeightVersion

SAMPLED = Sampled(
    prompt_index=3,
    prompt="The film",
    metadata={"topic": "plot"},
    completions=(
        SampledCompletion(" was fine.", (5, 6, 1), (-0.5, -1.25, -0.125), FinishReason.EOS, 11),
        SampledCompletion(" ran on", (7,), (-2.0,), FinishReason.LENGTH, 12),
    ),
    sampling=Sampling(temperature=0.7, top_k=50, seed=11, completions=2),
    version=WeightVersion("demo", 1, 40, "ab" * 32),
)
JUDGMENT = Judgment("3-0", 3, "The film", {"topic": "plot"}, ("a", "b", "c"), (2, 1, 2), "ann", (2, 0, 1), "demo/0-0")


def test_samples_survive_the_file(tmp_path: Path) -> None:
    assert write_samples(tmp_path / "s.jsonl", [SAMPLED, SAMPLED]) == 2
    assert read_samples(tmp_path / "s.jsonl") == [SAMPLED, SAMPLED]


def test_judgments_survive_the_file(tmp_path: Path) -> None:
    assert write_judgments(tmp_path / "j.jsonl", [JUDGMENT]) == 1
    assert read_judgments(tmp_path / "j.jsonl") == [JUDGMENT]


@pytest.mark.parametrize(
    "alter",
    [
        lambda row: row.pop("sampling"),
        lambda row: row["sampling"].update(heat=1),
        lambda row: row["completions"][0].pop("seed"),
        lambda row: row["completions"][0].update(finish_reason="bored"),
        lambda row: row["completions"][0].update(logprobs=[-0.5]),
        lambda row: row["completions"].append("text"),
        lambda row: row.update(prompt_index="3"),
    ],
)
def test_an_altered_row_of_samples_is_refused(tmp_path: Path, alter: Callable[[dict[str, Any]], None]) -> None:
    path = tmp_path / "s.jsonl"
    write_samples(path, [SAMPLED])
    row = json.loads(path.read_text())
    alter(row)
    write_rows(path, [row])
    with pytest.raises(DataError, match=r"s\.jsonl:1: "):
        read_samples(path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ranks", [1, 2], "must hold 3 whole numbers"),
        ("ranks", [0, 1, 2], "must hold 3 whole numbers"),
        ("ranks", [1, 2, 1.5], "only whole numbers"),
        ("ranks", [True, 2, 3], "only whole numbers"),
        ("order_shown", [0, 1, 1], "each of 0 to 2 once"),
        ("completions", ["a"], "at least two"),
        ("completions", ["a", 2, "c"], "only strings"),
        ("metadata", {"n": 1}, "only strings"),
        ("annotator", "", "is empty"),
    ],
)
def test_an_altered_judgment_is_refused(tmp_path: Path, name: str, value: object, said: str) -> None:
    path = tmp_path / "j.jsonl"
    write_judgments(path, [JUDGMENT])
    write_rows(path, [json.loads(path.read_text()) | {name: value}])
    with pytest.raises(DataError) as caught:
        read_judgments(path)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert said in str(caught.value)


def test_pairs_are_rankings_of_two_and_share_the_index_of_their_prompt(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "The film", "chosen": " is good", "rejected": " is bad"}
    write_rows(path, [pair, pair | {"prompt": "A song"}, pair | {"rejected": " is long"}])
    first, second, third = read_judgments(path)
    assert (first.completions, first.ranks) == ((" is good", " is bad"), (1, 2))
    assert [j.prompt_index for j in (first, second, third)] == [0, 1, 0]
    assert first.policy_version == "unknown:pairs.jsonl"
    assert len({j.judgment_id for j in (first, second, third)}) == 3
