"""The benchmark of annotators runs at sizes at which nothing is measured, and names what the table wants."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_annotators(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "feedback" / "annotators.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "feedback-annotators.json").read_text())
    wanted = {each["name"] for each in result["figures"] if each["at_most"] is not None or each["at_least"] is not None}
    assert wanted == {
        "30 % adversarial: cost with reliability",
        "30 % random: cost with reliability",
        "none bad: cost with reliability",
        "30 % adversarial: AUC of bad against honest",
        "30 % random: AUC of bad against honest",
        "minority: with tastes",
        "majority: loss by tastes",
        "minority called bad",
    }
    interval = result["checks"]["none bad: cost with reliability"]
    assert interval["low"] <= interval["mean"] <= interval["high"]
