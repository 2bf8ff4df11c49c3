import json
from pathlib import Path

from rlhf.observe.diagnoses import Found, metrics_rows, summary


def row(step: int, *names: str) -> dict[str, object]:
    found = [{"name": n, "severity": "warn", "what": f"{n} was {step}", "remedy": "Mend it"} for n in names]
    return {"step": step, "diagnoses": found}


def test_a_diagnosis_of_many_steps_is_told_once() -> None:
    rows = [row(1, "a"), row(2, "a", "b"), row(3, "a"), row(4, "b"), row(5, "c", "b")]
    assert [str(found) for found in summary(rows)] == [
        "warn: b (3 steps from 2 to 5): b was 5. Mend it",
        "warn: c (step 5): c was 5. Mend it",
        "warn: a (steps 1 to 3, holds again): a was 3. Mend it",
    ]


def test_rows_of_earlier_releases_have_none() -> None:
    assert summary([{"step": 1}, {"step": 2}]) == []


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics_rows(path) == []
    path.write_text(json.dumps(row(1, "a")) + "\n" + '{"step": 2, "diag')
    assert summary(metrics_rows(path)) == [Found("a", "warn", 1, 1, 1, "a was 1", "Mend it", holds=True)]
