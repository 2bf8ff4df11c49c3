"""`rlhf report`: one HTML file that shows what a run did, without anything beside it: no scripts, no other files.

It shows the parts that are there and leaves out the others, so it can be asked for in the middle of a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from rlhf.data.rows import read_rows
from rlhf.errors import DataError
from rlhf.evaluate import rounds
from rlhf.evaluate.findings import FORMS, sentences
from rlhf.evaluate.plots import (
    Plot,
    calibration,
    judge_distribution,
    learning_curves,
    over_optimisation,
    reward_against_judge,
    rollouts_by_age,
    seconds_by_phase,
)
from rlhf.evaluate.results import Evaluation, Frontier, Interval, Pair, read_evaluation, read_frontier
from rlhf.models.folders import read_json, storage_errors
from rlhf.observe.diagnoses import summary
from rlhf.observe.rounds import read_rounds
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings

_EACH = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """One line of the summary."""

    name: str
    before: str
    after: str
    beside: str
    """What to compare it with."""


@dataclass(frozen=True)
class Sample:
    group: str
    """The first of its group has its title, the others none."""
    pair: Pair
    change: float


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the report and returns its size.

    Raises:
        DataError: the run has nothing to report, or a file of it cannot be read.
        StorageError: the report cannot be written.
    """
    html = render(settings)
    path = settings.paths.report
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)
    _log.info("wrote %s", path)
    return {"report": str(path), "bytes": len(html.encode("utf-8"))}


def render(settings: Settings) -> str:
    """The page as text."""
    paths = settings.paths
    stages = _stages(paths, settings.run.stages)
    metrics = [row.fields for row in read_rows(paths.metrics)] if paths.metrics.exists() else []
    evaluation = read_evaluation(paths.evaluation) if paths.evaluation.exists() else None
    frontier = read_frontier(paths.frontier) if paths.frontier.exists() else None
    if not (stages or metrics or evaluation or frontier):
        raise DataError("has nothing to report yet; run a stage first", path=paths.folder)
    figures = {name: value for stage in stages.values() for name, value in stage["figures"].items()}
    figures |= dict(evaluation.figures) if evaluation else {}
    curves, constant = learning_curves(metrics)
    return _template().render(
        name=settings.run.name,
        headline=_headline(figures),
        lines=list(_lines(figures)),
        seconds={name: stage["seconds"] for name, stage in stages.items()},
        steps=len(metrics),
        curves=[*curves, *filter(None, [rollouts_by_age(metrics), seconds_by_phase(metrics)])],
        constant=constant,
        watched=any("diagnoses" in row for row in metrics),
        found=summary(metrics),
        outcome=_outcome_plots(evaluation, stages),
        frontier=_shown_frontier(frontier) if frontier else None,
        rounds=_shown_rounds(paths),
        evaluation=evaluation,
        samples=_samples(evaluation.pairs) if evaluation else [],
        settings=_shown_settings(settings),
    )


def _template() -> jinja2.Template:
    source = resources.files("rlhf.evaluate").joinpath("report.html.j2").read_text("utf-8")
    # What models wrote is untrusted: everything is escaped.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    return environment.from_string(source)


def number(value: float, digits: int = 2) -> str:
    """With a true minus sign, which is as wide as a plus."""
    return f"{value:.{digits}f}".replace("-", "−")


def _stages(paths: RunPaths, order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records of the finished stages, in the order of the run."""
    found = {path.stem: read_json(path) for path in sorted(paths.stages.glob("*.json"))}
    known = [name for name in order if name in found]
    return {name: found[name] for name in (*known, *(name for name in found if name not in known)) if name != "report"}


def _headline(figures: Mapping[str, Any]) -> str:
    if "judge_gain" not in figures:
        return "The run has not been evaluated yet."
    low, high = figures["judge_gain_interval"]
    verb = "rose" if figures["judge_gain"] >= 0 else "fell"
    return (
        f"On {figures['prompts']} held-out prompts the judge's score {verb} from {number(figures['judge_before'])} to "
        f"{number(figures['judge_after'])} (95 % interval of the change {number(low)} to {number(high)}), "
        f"{number(figures['kl'], 1)} nats of KL away from the initial policy."
    )


def _lines(figures: Mapping[str, Any]) -> Iterator[Line]:
    """The summary: each quantity before and after, as far as it was measured."""
    if "lm_perplexity" in figures:
        before, bigram = figures.get("lm_perplexity_before"), figures.get("bigram_perplexity")
        beside = "" if bigram is None else f"bigram model {number(bigram, 1)}"
        start = "" if before is None else number(before, 1)
        yield Line("Perplexity of the pretrained model", start, number(figures["lm_perplexity"], 1), beside)
    if "reward_model_accuracy" in figures:
        length = figures.get("length_only_accuracy")
        beside = "" if length is None else f"by length alone {number(length)}"
        yield Line("Reward model's held-out accuracy", "", number(figures["reward_model_accuracy"]), beside)
    if "noise_free_reward_model_accuracy" in figures:
        beside = f"by length alone {number(figures['noise_free_length_only_accuracy'])}"
        accuracy = number(figures["noise_free_reward_model_accuracy"])
        yield Line("Against the annotators' noise-free preference, on held-out prompts", "", accuracy, beside)
    labels = {"judge": "Judge's score", "reward": "Reward", "first_reward": "By the reward model that PPO began with"}
    for name, label in labels.items():
        if f"{name}_after" in figures:
            before, after = (_with_interval(figures, f"{name}_{when}") for when in ("before", "after"))
            yield Line(label, before, after, f"change {_with_interval(figures, f'{name}_gain')}")
    if "kl" in figures:
        yield Line("KL to the initial policy, nats per completion", number(0.0), _with_interval(figures, "kl"), "")
    for name, label, digits in (
        ("response_tokens", "Response length, tokens", 1),
        ("ended", "Share that ended by itself", 2),
        ("distinct_bigrams", "Distinct word pairs", 0),
        ("distinct_bigram_share", "Their share of all word pairs", 2),
    ):
        if f"{name}_after" in figures:
            yield Line(label, number(figures[f"{name}_before"], digits), number(figures[f"{name}_after"], digits), "")
    if figures.get("judge_heldout_accuracy") is not None:
        yield Line("Judge's own held-out accuracy", "", number(figures["judge_heldout_accuracy"]), "")


def _with_interval(figures: Mapping[str, Any], name: str) -> str:
    interval = figures.get(f"{name}_interval")
    return number(figures[name]) + ("" if interval is None else f" [{number(interval[0])}, {number(interval[1])}]")


def _outcome_plots(evaluation: Evaluation | None, stages: Mapping[str, Mapping[str, Any]]) -> list[Plot]:
    plots = [judge_distribution(evaluation.pairs), reward_against_judge(evaluation.pairs)] if evaluation else []
    bins = stages.get("reward-model", {}).get("figures", {}).get("calibration")
    if bins:
        plots.append(calibration(*([row[name] for row in bins] for name in ("predicted", "observed", "pairs"))))
    return plots


def _shown_frontier(frontier: Frontier) -> dict[str, Any]:
    rows = [
        (
            FORMS[fitted.form],
            _bracketed(fitted.alpha, fitted.alpha_interval, 3),
            _bracketed(fitted.beta, fitted.beta_interval, 3),
            _bracketed(fitted.optimum_d, fitted.optimum_d_interval, 2),
            _bracketed(fitted.optimum_gain, fitted.optimum_gain_interval, 3),
            f"{fitted.misfit:.3f}",
        )
        for fitted in frontier.fits
    ]
    return {"plot": over_optimisation(frontier), "fits": rows, "sentences": sentences(frontier)}


def _shown_rounds(paths: RunPaths) -> dict[str, Any] | None:
    found = read_rounds(paths)
    if not found:
        return None
    return {"headings": rounds.HEADINGS, "rows": rounds.rows(found), "plot": rounds.audits(found)}


def _bracketed(value: float | None, interval: Interval, digits: int) -> str:
    """`value [low, high]`; None is infinite."""
    shown, low, high = ("∞" if one is None else number(one, digits) for one in (value, *interval))
    return f"{shown} [{low}, {high}]"


def _samples(pairs: Sequence[Pair]) -> list[Sample]:
    """The largest rises, the middle and the largest falls of the judge's score, each pair once."""
    ordered = sorted(pairs, key=lambda pair: pair.judge_before - pair.judge_after)
    each = min(_EACH, len(ordered) // 3) or 1
    middle = (len(ordered) - each) // 2
    groups = {
        "Largest rise": ordered[:each],
        "In the middle": ordered[middle : middle + each] if len(ordered) > 2 else [],
        "Largest fall, or smallest rise": ordered[-each:] if len(ordered) > 1 else [],
    }
    return [
        Sample(group if place == 0 else "", pair, pair.judge_after - pair.judge_before)
        for group, members in groups.items()
        for place, pair in enumerate(members)
    ]


def _shown_settings(settings: Settings) -> dict[str, Any]:
    """As the run was started, if that is known, by section."""
    path = settings.paths.settings
    content: dict[str, Any] = read_json(path) if path.exists() else settings.model_dump(mode="json")
    return content
