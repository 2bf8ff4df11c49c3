"""The benchmarks of feedback run at sizes at which nothing is measured, and name what the table wants; and what they
reckon by themselves is right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from feedback.intervals import interval
from feedback.selection import logit_variance, shares
from feedback.world import judged
from rlhf.rounds.selection import is_given_up
from support.scripts import run_script
from support.tiny import tiny_lm_folder
from table import FEEDBACK_NAMES, everything, headlines, load

FOLDER = Path(__file__).parents[2] / "benchmarks" / "feedback"
WANTED = {
    "annotators": {
        "30 % adversarial: cost with reliability",
        "30 % random: cost with reliability",
        "none bad: cost with reliability",
        "30 % adversarial: AUC of bad against honest",
        "30 % random: AUC of bad against honest",
        "minority: with tastes",
        "majority: loss by tastes",
        "minority called bad",
    },
    # Labels have a bound only where some seed went on choosing, and at these sizes all give it up.
    "selection": {
        f"{world}BALD, fall-back: above random with as many labels, mean of rounds" for world in ("", "uneven: ")
    },
    "sentences": {
        *(
            f"30 % {kind}: {better}"
            for kind in ("adversarial", "random", "lazy")
            for better in (
                "plain Plackett-Luce above naive Bradley-Terry",
                "with reliability above plain Plackett-Luce",
            )
        ),
        "30 % adversarial: cost with reliability",
        "30 % random: cost with reliability",
        "minority: with tastes above with reliability",
        "majority: loss by tastes",
        "minority called bad",
    },
}
INTERVALS = {
    "annotators": "none bad: cost with reliability",
    "selection": "BALD, fall-back: labels for random's accuracy",
    "sentences": "30 % random: cost with reliability",
}


@pytest.mark.parametrize("name", WANTED)
def test_a_benchmark_of_feedback_leaves_its_figures(name: str, tmp_path: Path) -> None:
    more = _sentences(tmp_path) if name == "sentences" else []
    result = _run(name, tmp_path, more)
    wanted = {each["name"] for each in result["figures"] if each["at_most"] is not None or each["at_least"] is not None}
    assert wanted == WANTED[name]
    found = result["checks"][INTERVALS[name]]
    assert found["low"] <= found["mean"] <= found["high"]
    assert f"feedback-{name}" in FEEDBACK_NAMES
    assert all(one in headlines(load(tmp_path)) for one in wanted)
    assert all(one["name"] in everything(load(tmp_path)) for one in result["figures"])


def test_sentences_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _run("sentences", tmp_path, ["--sentences", str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert f"--sentences: there is no {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_the_interval_is_students() -> None:
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3))
    found = interval([1.0, 2.0, 3.0])
    assert found == pytest.approx({"mean": 2.0, "low": -0.4843, "high": 4.4843}, abs=1e-3)


def test_labels_for_the_same_accuracy_are_read_between_rounds() -> None:
    """Of 4 equal parts: the random curve ends at 8, which the other has half-way from its 2nd to its 3rd part."""
    at_random, active = np.array([[0.0, 4, 6, 8]] * 3), np.array([[0.0, 6, 10, 12]] * 3)
    assert shares(active, at_random) == pytest.approx({"mean": 62.5, "low": 62.5, "high": 62.5})
    assert shares(at_random, at_random)["mean"] == 100
    assert shares(at_random - 1, at_random)["mean"] == 100


def test_active_selection_is_given_up_after_two_rounds_without_gain() -> None:
    assert not is_given_up([])
    assert not is_given_up([-1.0])
    assert is_given_up([0.5, -1.0])
    assert not is_given_up([-1.0, 2.0])
    assert is_given_up([9.0, -1.0, 0.5])


def test_logit_variance_asks_where_members_differ_widely() -> None:
    """Two members, two completions: variance of the differences 1 and 3 is 1."""
    scores = np.array([[[1.0, 3.0], [0.0, 0.0]], [[5.0, 5.0], [0.0, 0.0]]])
    assert logit_variance(scores).tolist() == [1.0, 0.0]


def test_annotators_rank_what_they_are_given() -> None:
    """Without noise the honest one's ranking is the taste's, and the adversary's is that upside down."""
    rng = np.random.default_rng(0)
    features, taste = rng.normal(size=(6, 4, 3)), rng.normal(size=(6, 4))
    world = judged(["honest", "adversarial"], [0.0], 6, features, [taste, taste], features, [taste, taste], seed=0)
    assert world.features.shape == (24, 3)
    order = (-taste).argsort(1).argsort(1) + 1
    for prompt, ranks, who in zip(
        world.rankings.prompts.tolist(), world.rankings.ranks.tolist(), world.rankings.annotators.tolist(), strict=True
    ):
        assert ranks == (order[prompt] if who == 0 else 5 - order[prompt]).tolist()


def _sentences(folder: Path) -> list[str]:
    """A folder and a model such as the benchmark asks for."""
    rng = np.random.default_rng(0)
    words = {"positive": ["good", "fine", "moving"], "negative": ["bad", "dull", "a mess"]}
    rows = []
    for number in range(400):
        label = ("positive", "negative")[number % 2]
        rest = " ".join(rng.choice(["the", "film", "story", "with", "of", "and", "it"], 9).tolist())
        rows.append({"text": f"{rest} {rng.choice(words[label])} {number}", "label": label})
    folder.joinpath("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"text": row["text"]} for row in rows]
    folder.joinpath("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    model = tiny_lm_folder(folder / "model", context=512)
    return ["--sentences", str(folder), "--model", str(model)]


def _run(name: str, out: Path, more: list[str]) -> dict:
    run_script(FOLDER / f"{name}.py", "--quick", "--out", str(out), *more)
    return json.loads((out / f"feedback-{name}.json").read_text())
