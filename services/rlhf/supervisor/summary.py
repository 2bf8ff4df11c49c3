"""The end of a run: summary.json, a small table, before/after pairs, and the condition on the judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.cli.records import StageRecord
from rlhf.errors import StageFailed
from rlhf.models.folders import read_json
from rlhf.observe.rounds import read_rounds
from rlhf.settings.run import Settings

FIGURES: dict[str, tuple[str, ...]] = {
    "pretrain": ("lm_perplexity_before", "lm_perplexity", "bigram_perplexity"),
    "reward-model": (
        *("reward_model_accuracy", "length_only_accuracy"),
        *("noise_free_reward_model_accuracy", "noise_free_length_only_accuracy"),
    ),
    "ppo": ("steps", "rollouts", "stale", "dead"),
    "evaluate": (
        *("prompts", "reward_before", "reward_before_interval", "reward_after", "reward_after_interval"),
        *("first_reward_before", "first_reward_before_interval", "first_reward_after", "first_reward_after_interval"),
        *("judge_before", "judge_before_interval", "judge_after", "judge_after_interval"),
        *("judge_gain", "judge_gain_interval", "kl", "kl_interval"),
        *("distinct_bigrams_before", "distinct_bigrams_after"),
    ),
}
"""By stage, the figures of its record that the summary takes over."""


ROUND_FIGURES = (
    *("round", "policy_step", "judgments", "chosen_by", "accuracy_in_service", "accuracy_new"),
    *("accuracy_gain_interval", "promoted", "audit", "seconds"),
)
"""Of each round of feedback."""


def collect(settings: Settings) -> dict[str, Any]:
    """`FIGURES` of the stages that this run has, and `seconds` by stage."""
    summary: dict[str, Any] = {"run": settings.run.name}
    seconds: dict[str, float] = {}
    for stage in settings.run.stages:
        record = StageRecord.read(settings.paths.stages, stage)
        if record is None:
            raise StageFailed(f"{stage} has left no record in {settings.paths.stages}; run it again")
        seconds[stage] = record.seconds
        summary |= {name: record.figures[name] for name in FIGURES.get(stage, ()) if name in record.figures}
    if rounds := read_rounds(settings.paths):
        summary["rounds"] = [{name: one[name] for name in ROUND_FIGURES if name in one} for one in rounds]
    return {**summary, "seconds": {**seconds, "total": round(sum(seconds.values()), 2)}}


def show(summary: Mapping[str, Any], settings: Settings, console: Console) -> None:
    console.print()
    console.print(_table(summary))
    if "rounds" in summary:
        console.print()
        console.print(_rounds(summary["rounds"]))
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in summary["seconds"].items())
    _plain(console, f"\nseconds: {seconds}")
    if "evaluate" in settings.run.stages:
        for pair in _pairs(settings):
            _plain(console, "")
            for part in ("prompt", "before", "after"):
                _plain(console, f"{part:<7} {' '.join(pair[part].split())}")
    report = settings.paths.report if "report" in settings.run.stages else settings.paths.summary
    _plain(console, f"\n{report}")


def check_gain(summary: Mapping[str, Any], settings: Settings) -> None:
    """
    Raises:
        StageFailed: `run.min_judge_gain` is set and not met.
    """
    least = settings.run.min_judge_gain
    if least is None:
        return
    gain, (low, high) = summary["judge_after"] - summary["judge_before"], summary["judge_gain_interval"]
    if gain < least or low <= 0:
        raise StageFailed(
            f"the judge's score rose by {gain:.3f} (95 % interval {low:.3f} to {high:.3f}), but run.min_judge_gain "
            f"asks for at least {least:g} with the interval above 0; see {settings.paths.report}"
        )


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"run {summary['run']}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("before", "after", "beside it"):
        table.add_column(column, justify="right")
    for row in _rows(summary):
        table.add_row(*row)
    return table


def _rows(summary: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    if "lm_perplexity" in summary:
        before, bigram = summary.get("lm_perplexity_before"), summary.get("bigram_perplexity")
        compare = "" if bigram is None else f"bigrams {bigram:.1f}"
        yield "perplexity", _number(before, 1), _number(summary["lm_perplexity"], 1), compare
    for prefix, label in (("", "reward accuracy"), ("noise_free_", "  without noise")):
        if f"{prefix}reward_model_accuracy" in summary:
            compare = f"length alone {_number(summary.get(f'{prefix}length_only_accuracy'), 3)}"
            yield label, "", _number(summary[f"{prefix}reward_model_accuracy"], 3), compare
    for name, label in (("reward", "reward"), ("first_reward", "  by the first model"), ("judge", "judge")):
        if f"{name}_after" in summary:
            gain = summary.get(f"{name}_gain_interval")
            compare = "" if gain is None else f"gain {gain[0]:.2f} to {gain[1]:.2f}"
            yield label, _with_interval(summary, f"{name}_before"), _with_interval(summary, f"{name}_after"), compare
    if "kl" in summary:
        yield "KL (nats)", "", _with_interval(summary, "kl"), ""
    if "distinct_bigrams_after" in summary:
        before, after = summary["distinct_bigrams_before"], summary["distinct_bigrams_after"]
        yield "distinct bigrams", str(before), str(after), f"{after / before:.0%}" if before else ""
    if "rollouts" in summary:
        yield "rollouts", "", str(summary["rollouts"]), ""


def _rounds(rounds: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(title="rounds of feedback", title_justify="left", box=None, pad_edge=False, header_style="bold")
    columns = ("at step", "judgments", "accuracy in service", "refreshed", "promoted", "new policy preferred")
    for column in columns:
        table.add_column(column, justify="right")
    for one in rounds:
        promoted = "" if "promoted" not in one else "yes" if one["promoted"] else "no"
        accuracies = (_number(one.get(name), 3) for name in ("accuracy_in_service", "accuracy_new"))
        preferred = _with_interval(one["audit"], "win_rate")
        table.add_row(str(one["policy_step"]), str(one.get("judgments", "")), *accuracies, promoted, preferred)
    return table


def _plain(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _with_interval(summary: Mapping[str, Any], name: str) -> str:
    interval = summary.get(f"{name}_interval")
    beside = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return _number(summary.get(name), 2) + beside


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _pairs(settings: Settings) -> list[dict[str, str]]:
    found: list[dict[str, str]] = read_json(settings.paths.evaluation)["pairs"]
    return found[: settings.evaluate.pairs]
