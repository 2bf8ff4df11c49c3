"""What the benchmark of the loop reckons from a run's snapshots, and the script itself at sizes at which nothing is
measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from feedback.loop import CONSERVATIVE, LOOP, PLAIN, at_rounds, draw, fall, figures
from rlhf.evaluate.results import Point
from table import FEEDBACK_NAMES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "feedback" / "loop.py"
NOWHERE = (None, None)


def run(*gains: float) -> list[Point]:
    return [
        Point("rl", f"step {number}", float(number), NOWHERE, 2.0 * gain, NOWHERE, gain, NOWHERE)
        for number, gain in enumerate(gains, start=1)
    ]


def test_the_deepest_fall_is_below_the_best_before_it():
    assert fall(run(0.1, 0.4, 0.3, 0.25)) == pytest.approx(0.15)
    assert fall(run(0.1, 0.4, 0.1, 0.9, 0.7)) == pytest.approx(0.3)
    assert fall(run(-0.2, 0.2, 0.3)) == pytest.approx(0.2), "the initial policy's gain is 0"
    assert fall(run(0.1, 0.2, 0.3)) == 0


def test_rounds_are_at_the_first_third_and_fifth_of_seven_snapshots():
    rises = at_rounds(run(0.1, 9, 0.3, 9, 0.2, 9, 0.6))
    assert rises == pytest.approx([0.2, -0.1, 0.4])


def test_figures_name_what_is_wanted_and_compare_runs_of_one_seed():
    up, down = run(*[0.1 * n for n in range(1, 8)]), run(0.1, 0.3, 0.5, 0.4, 0.3, 0.2, 0.1)
    curves = {PLAIN: [down, up], CONSERVATIVE[0]: [up, up], LOOP: [up, down]}
    found = {figure.name: figure for figure in figures(curves)}
    assert found["worst: above the mean at the end"].values == pytest.approx([0.6, 0.0])
    assert found["three rounds: above the mean at the end"].values == pytest.approx([0.6, -0.6])
    assert found["mean: deepest fall of the judge's score"].values == pytest.approx([0.4, 0.0])
    assert found["worst: of the mean's deepest fall it is spared"].values == pytest.approx([0.4, 0.0])
    assert found["three rounds: of the mean's deepest fall it is spared"].values == pytest.approx([0.4, -0.4])
    assert found["three rounds: rise of the judge's score from round 3 to the end"].values == pytest.approx([0.2, -0.2])
    wanted = {name for name, figure in found.items() if figure.at_least is not None}
    assert wanted == {
        "worst: of the mean's deepest fall it is spared",
        "three rounds: of the mean's deepest fall it is spared",
        *(f"three rounds: rise of the judge's score from round {n} to round {n + 1}" for n in (1, 2)),
        "three rounds: rise of the judge's score from round 3 to the end",
    }


def test_the_curves_are_a_picture(tmp_path):
    draw(tmp_path / "new" / "curves.png", {PLAIN: [run(0.1, 0.2)], LOOP: [run(0.2, 0.3), run(0.1, 0.3)]})
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_script_leaves_its_figures(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)], capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "feedback-loop.json").read_text())
    assert len(result["checks"]["KL and judge's gain"]["three rounds, seed 0"]) == 7
    assert (tmp_path / "feedback-loop.png").exists()
    assert "feedback-loop" in FEEDBACK_NAMES
