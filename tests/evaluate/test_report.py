"""The report is one whole file, shows the parts that are there, and lets no model's text become markup."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rlhf.data.rows import write_rows
from rlhf.errors import DataError
from rlhf.evaluate.plots import learning_curves, over_optimisation, rollouts_by_age, seconds_by_phase
from rlhf.evaluate.report import run
from rlhf.evaluate.results import Evaluation, Fit, Frontier, Pair, Point, write_evaluation, write_frontier
from rlhf.models.folders import write_json
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings

FIGURES = {
    "prompts": 9,
    **{f"{name}_before": 0.5 for name in ("reward", "judge", "ended", "response_tokens", "distinct_bigram_share")},
    **{f"{name}_after": 0.875 for name in ("reward", "judge", "ended", "response_tokens", "distinct_bigram_share")},
    "distinct_bigrams_before": 2000,
    "distinct_bigrams_after": 1500,
    **{f"{name}_gain": 0.375 for name in ("reward", "judge")},
    **{f"{name}_interval": [-0.25, 0.625] for name in ("reward_gain", "judge_gain", "kl")},
    "kl": 3.25,
    "judge_heldout_accuracy": None,
}
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Elements in order; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    @property
    def headings(self) -> list[str]:
        return re.findall(
            r"Summary|Outcome|Over-optimisation|Before and after|Learning curves|Time|Settings", self.text
        )


def pair(number: int, before: str = " was dull.", judge_after: float | None = None) -> Pair:
    after = number / 10 if judge_after is None else judge_after
    return Pair(f"Prompt {number}", before, f" is fine {number}.", 0.0, 1.0, 0.5, after, 2.0, 5, 6, True, False)


def metrics(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": n,
            "score_mean": n / 10,
            "reward_mean": n / 20,
            "kl_mean": 0.1 * n,
            "kl_coef": 0.1,
            "entropy": 2 - n / 50,
        }
        | {"seconds_train": 1.0, "seconds_wait": 2.0, "seconds_publish": 0.0, "staleness_mean": None}
        for n in range(1, steps + 1)
    ]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    chosen = Settings(
        run=RunSettings(folder=tmp_path, stages=("pretrain", "reward-model", "ppo", "evaluate", "report"))
    )
    chosen.paths.folder.mkdir()
    return chosen


def write_stage(settings: Settings, verb: str, seconds: float, **figures: Any) -> None:
    record = {"verb": verb, "seconds": seconds, "finished_unix_s": 0.0, "settings": {}, "figures": figures}
    write_json(settings.paths.stages / f"{verb}.json", record)


def write_evaluated(settings: Settings, *pairs: Pair, **figures: object) -> None:
    own = FIGURES | figures
    write_evaluation(
        settings.paths.evaluation, Evaluation("before/", "after/", "rm/", "judge.jsonl", {}, 0, own, pairs)
    )


def frontier(*fits: Fit) -> Frontier:
    """Three points of best-of-n, and one of PPO."""
    points = [Point("best_of_n", f"best of {n}", n / 4, (n / 4, n / 4), n, (1, 9), 0.1, (0, 0.2)) for n in (2, 4, 8)]
    points.append(Point("rl", "step 9", 4.0, (3.0, 5.0), 2.0, (1, None), -0.1, (-0.3, 0.1)))
    return Frontier("i", "r", "j", {}, 0, 9, 8, 4, 0.0, 0.5, 0.625, tuple(points), fits, {"rl": "too <few> points"})


FIT = Fit(
    *("best_of_n", 3, 0.3, (0.2, 0.4), 0.1, (-0.05, 0.2), 1.5, (1.0, None), 0.225, (0.1, None), 0.8, 1.75, 0.01),
    curve=tuple((d / 4, d / 40, d / 50, d / 30) for d in range(8)),
)


def page(settings: Settings) -> Page:
    figures = run(settings)
    assert figures == {"report": str(settings.paths.report), "bytes": settings.paths.report.stat().st_size}
    return Page(settings.paths.report.read_text(encoding="utf-8"))


def test_two_reward_models_are_two_lines(settings: Settings) -> None:
    write_evaluated(settings, pair(0), first_reward_before=-0.03, first_reward_after=1.5, first_reward_gain=1.53)
    assert "By the reward model that PPO began with−0.031.50change 1.53" in "".join(page(settings).text.split("\n"))


def test_a_whole_run(settings: Settings) -> None:
    bins = [{"predicted": p / 10, "observed": p / 11, "pairs": 10 * p} for p in range(1, 10)]
    write_stage(settings, "ppo", 20.0)
    write_stage(settings, "pretrain", 12.5, lm_perplexity_before=700.0, lm_perplexity=6.5, bigram_perplexity=18.0)
    write_stage(settings, "reward-model", 3.0, reward_model_accuracy=0.81, length_only_accuracy=0.55, calibration=bins)
    write_rows(settings.paths.metrics, metrics(12))
    write_evaluated(settings, *map(pair, range(9)))
    shown = page(settings)
    assert shown.headings == [*("Summary", "Outcome", "Before and after", "Learning curves", "Time", "Settings")]
    for text in ("700.0", "bigram model 18.0", "by length alone 0.55", "0.88", "change 0.38 [−0.25, 0.62]", "3.25"):
        assert text in shown.text, text
    assert "rose from 0.50 to 0.88 (95 % interval of the change −0.25 to 0.62)" in shown.text
    times = re.findall(r"pretrain|reward-model|ppo|total", shown.text.partition("Time")[2].partition("Settings")[0])
    assert times == ["pretrain", "reward-model", "ppo", "total"]
    assert "KL coefficient 0.1" in shown.text
    # Three of the outcome (judge, reward, calibration), three curves that move, the seconds.
    images = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert len(images) == 7
    assert all(image["alt"] for image in images)


def test_the_file_needs_nothing_beside_it(settings: Settings) -> None:
    write_rows(settings.paths.metrics, metrics(3))
    write_evaluated(settings, *map(pair, range(4)))
    shown = page(settings)
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "iframe", "object"}
    for _, attributes in shown.tags:
        assert not attributes.get("href")
        source = attributes.get("src")
        if source:
            kind, data = source.split(",")
            assert kind == "data:image/svg+xml;base64"
            assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")


@pytest.mark.parametrize("part", ["stage", "metrics", "evaluation", "frontier"])
def test_any_part_alone_makes_a_report(settings: Settings, part: str) -> None:
    if part == "stage":
        write_stage(settings, "pretrain", 1.0, lm_perplexity=6.5)
    elif part == "metrics":
        write_rows(settings.paths.metrics, metrics(1))
    elif part == "frontier":
        write_frontier(settings.paths.frontier, frontier())
    else:
        write_evaluated(settings, pair(0))
    expected = {
        "stage": ["Summary", "Time", "Settings"],
        "metrics": ["Learning curves", "Settings"],
        "evaluation": ["Summary", "Outcome", "Before and after", "Settings"],
        "frontier": ["Over-optimisation", "Settings"],
    }
    shown = page(settings)
    assert shown.headings == expected[part]
    assert ("has not been evaluated yet" in shown.text) == (part != "evaluation")


def test_nothing_to_report_is_refused(settings: Settings) -> None:
    with pytest.raises(DataError, match="nothing to report yet"):
        run(settings)
    assert not settings.paths.report.exists()


def test_text_of_models_is_text(settings: Settings) -> None:
    hostile = '<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} & "quoted"'
    write_evaluated(settings, pair(0, before=hostile))
    shown = page(settings)
    assert hostile in shown.text
    assert "script" not in {tag for tag, _ in shown.tags}
    assert not [attributes for _, attributes in shown.tags if "onerror" in attributes]


def test_samples_are_the_best_the_middle_and_the_worst(settings: Settings) -> None:
    pairs = [pair(n, judge_after=score) for n, score in enumerate((0.9, 0.1, 0.5, 0.8, 0.2, 0.51, 0.49, 1.0, 0.0))]
    write_evaluated(settings, *pairs)
    order = [int(n) for n in re.findall(r"Prompt (\d+) is fine", page(settings).text)]
    assert order == [7, 0, 3, 5, 2, 6, 4, 1, 8]


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (2, 2), (3, 3), (7, 6)])
def test_no_pair_is_shown_twice(settings: Settings, count: int, shown: int) -> None:
    write_evaluated(settings, *map(pair, range(count)))
    order = re.findall(r"Prompt (\d+) is fine", page(settings).text)
    assert len(order) == len(set(order)) == shown


def test_the_same_run_gives_the_same_report(settings: Settings) -> None:
    write_rows(settings.paths.metrics, metrics(100))
    write_evaluated(settings, *map(pair, range(9)))
    run(settings)
    first = settings.paths.report.read_bytes()
    run(settings)
    assert settings.paths.report.read_bytes() == first


def test_settings_are_those_that_the_run_began_with(settings: Settings) -> None:
    write_rows(settings.paths.metrics, metrics(2))
    assert "batch_prompts" in page(settings).text
    write_json(settings.paths.settings, {"ppo": {"steps": 12345, "rule": ""}})
    shown = page(settings)
    assert "12345" in shown.text
    assert "batch_prompts" not in shown.text


def test_a_broken_evaluation_is_named(settings: Settings) -> None:
    settings.paths.evaluation.write_text(json.dumps({"pairs": [{"prompt": "p"}]}))
    with pytest.raises(DataError, match=r"evaluation\.json: is no evaluation"):
        run(settings)


def test_a_frontier_has_its_plot_its_fits_and_its_limits(settings: Settings) -> None:
    write_frontier(settings.paths.frontier, frontier(FIT))
    shown = page(settings)
    for text in ("0.300 [0.200, 0.400]", "0.100 [−0.050, 0.200]", "1.50 [1.00, ∞]", "0.225 [0.100, ∞]", "0.010"):
        assert text in shown.text, text
    assert "PPO: no curve was fitted: too <few> points." in shown.text
    assert "in 80% of the resamples" in shown.text
    assert "The judge is a stand-in for people" in shown.text
    (image,) = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert (
        image["alt"]
        == "best of 8 at 2.00 nats: reward +8.00, judge +0.10; step 9 at 4.00 nats: reward +2.00, judge -0.10"
    )


def test_a_peak_is_drawn_only_where_there_were_measurements() -> None:
    seen, beyond, endless = (
        base64.b64decode(over_optimisation(frontier(fit)).image.split(",")[1])
        for fit in (FIT, replace(FIT, optimum_d=9.0), replace(FIT, optimum_d=None, optimum_gain=None))
    )
    assert beyond == endless
    assert len(seen) > len(beyond)


def test_curves_that_do_not_move_are_told_and_not_drawn() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "kl_coef": 0.2, "entropy": 2.0, "clip_fraction": None},
        {"step": 2, "kl_coef": 0.2, "entropy": 1.0, "clip_fraction": float("nan"), "own_metric": 1.0},
    ]
    plots, constant = learning_curves(rows)
    assert [plot.title for plot in plots] == ["Entropy"]
    assert plots[0].alt == "Entropy: entropy from 2 to 1"
    assert constant == {"KL coefficient": 0.2}
    assert learning_curves([]) == ([], {})


def test_phases_are_stacked_longest_first() -> None:
    plot = seconds_by_phase(metrics(4))
    assert plot is not None
    assert plot.caption == "In total: wait 8 s, train 4 s."
    assert seconds_by_phase([{"step": 1}]) is None


def test_rollouts_of_older_weights_are_drawn_by_their_age() -> None:
    rows = [{"step": n, "staleness_mean": 0.5, "staleness_0": 4.0, "staleness_2": 4.0 * (n > 1)} for n in (1, 2, 3)]
    plot = rollouts_by_age([*rows, {"step": 4, "staleness_0": 4.0, "staleness_10": 8.0}])
    assert plot is not None
    assert plot.alt == "Rollouts by age, 0: 50%, 2: 25%, 10: 25%"
    assert rollouts_by_age([{"step": 1, "staleness_mean": 0.0, "staleness_0": 4.0, "staleness_1": 0.0}]) is None


def test_what_the_monitor_found_is_a_table(settings: Settings) -> None:
    found = {"name": "length", "severity": "warn", "what": "it grew <from> 9 to 20", "remedy": "Read the samples"}
    rows = metrics(3)
    rows[1]["diagnoses"], rows[2]["diagnoses"] = [found], [found]
    write_rows(settings.paths.metrics, rows)
    shown = page(settings).text.partition("Invariants")[2].partition("Settings")[0]
    assert "lengthsteps 2 to 3it grew <from> 9 to 20Read the samples" in "".join(shown.splitlines())


def test_a_run_in_which_everything_held_says_so(settings: Settings) -> None:
    write_rows(settings.paths.metrics, [row | {"diagnoses": []} for row in metrics(3)])
    assert "All that the trainer watches held in every step." in page(settings).text
    write_rows(settings.paths.metrics, metrics(3))
    assert "Invariants" not in page(settings).text, "nobody watched"
