"""What is written is read back equal, and altered rows are refused with their line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def test_samples_survive_the_file(tmp_path: Path) -> None:
    assert write_samples(tmp_path / "s.jsonl", [SAMPLED, SAMPLED]) == 2
    assert read_samples(tmp_path / "s.jsonl") == [SAMPLED, SAMPLED]


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
