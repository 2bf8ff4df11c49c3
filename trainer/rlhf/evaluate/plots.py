"""The report's figures, as SVG in data URIs. One look for all: thin axes, labelled units, the same colour for the same
thing, and no drawing where there is nothing to see."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from rlhf.evaluate.results import Fit, Form, Frontier, Interval, Pair, Point

BEFORE, AFTER, ACCENT = "#98a2b3", "#1d5fa8", "#c2571a"
_INK, _FAINT = "#344054", "#e4e7ec"
_PHASES = ("#1d5fa8", "#7fb0e0", "#c2571a", "#eab38b", "#4d7c5b", "#a9c9b2", "#98a2b3", "#d0d5dd")
_SIZE = (3.7, 2.3)
_WIDE = (8.6, 3.2)
_FORMS: Mapping[Form, tuple[str, str]] = {"best_of_n": (ACCENT, "best of n"), "rl": (AFTER, "PPO")}
_SMOOTH_FROM = 80

LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": "#c3c9d3",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": "#667085",
    "ytick.color": "#667085",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Without a salt of its own every drawing would get other ids, and the same run another report.
    "svg.hashsalt": "rlhf",
}

Metrics = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    title: str
    image: str
    """A data URI."""
    caption: str
    alt: str
    """What it shows, for those who do not see it."""


@dataclass(frozen=True)
class Curve:
    """A learning curve: what is drawn, from which fields of the metrics."""

    title: str
    unit: str
    caption: str
    fields: Mapping[str, str]
    """Field to label; one curve each."""


CURVES = (
    Curve(
        "Reward",
        "mean per completion",
        "What the reward model gives, and what is left after the KL penalty.",
        {"score_mean": "score", "reward_mean": "score − KL penalty"},
    ),
    Curve(
        "KL to the initial policy",
        "nats per completion",
        "How far the policy has moved, summed over a completion's tokens.",
        {"kl_mean": "KL"},
    ),
    Curve("KL coefficient", "", "Weight of the KL penalty.", {"kl_coef": "coefficient"}),
    Curve(
        "Entropy", "nats per token", "How undecided the policy is; 0 would be a single answer.", {"entropy": "entropy"}
    ),
    Curve(
        "Clip fraction",
        "share of tokens",
        "Tokens whose probability moved further than PPO's clip range in one step.",
        {"clip_fraction": "clip fraction"},
    ),
    Curve(
        "Value loss", "squared error", "Of the critic, in units of the reward squared.", {"value_loss": "value loss"}
    ),
    Curve(
        "Explained variance",
        "1 = perfect",
        "Share of the returns' variance that the critic foresaw.",
        {"explained_variance": "explained variance"},
    ),
    Curve("Response length", "tokens", "Mean over the completions of a step.", {"response_tokens_mean": "length"}),
    Curve("Ended by itself", "share", "Completions with an end token within the limit.", {"ended_fraction": "ended"}),
    Curve("Staleness", "steps", "Mean age of the weights behind the rollouts of a step.", {"staleness_mean": "mean"}),
)


def learning_curves(metrics: Metrics) -> tuple[list[Plot], dict[str, float]]:
    """A plot of each curve that the metrics have and that moves; of the others, title and value."""
    plots, constant = [], {}
    for curve in CURVES:
        series = {label: _series(metrics, field) for field, label in curve.fields.items()}
        series = {label: drawn for label, drawn in series.items() if len(drawn[0])}
        values = np.concatenate([drawn[1] for drawn in series.values()]) if series else np.zeros(0)
        if len(values) and np.ptp(values) == 0:
            constant[curve.title] = float(values[0])
        elif len(values):
            plots.append(_curve_plot(curve, series))
    return plots, constant


def seconds_by_phase(metrics: Metrics) -> Plot | None:
    """Fields `seconds_<phase>` stacked, the longest phase below."""
    names = {name for row in metrics for name, value in row.items() if name.startswith("seconds_") and value}
    phases = {name: [float(row.get(name) or 0.0) for row in metrics] for name in names}
    longest_first = sorted(phases, key=lambda name: (-sum(phases[name]), name))
    if not longest_first:
        return None
    series = {name.removeprefix("seconds_").replace("_", " "): phases[name] for name in longest_first}
    totals = ", ".join(f"{label} {sum(values):.0f} s" for label, values in series.items())
    caption, alt = f"In total: {totals}.", f"Seconds by phase: {totals}"
    return Plot("Where the time goes", _stacked(metrics, "s per step", series), caption, alt)


def rollouts_by_age(metrics: Metrics) -> Plot | None:
    """Fields `staleness_<steps>` stacked, the freshest below. None: all rollouts were fresh."""
    names = {name for row in metrics for name, count in row.items() if re.fullmatch(r"staleness_\d+", name) and count}
    if not names - {"staleness_0"}:
        return None
    by_age = sorted(names, key=lambda name: int(name.removeprefix("staleness_")))
    counts = {name: [float(row.get(name) or 0.0) for row in metrics] for name in by_age}
    total = sum(map(sum, counts.values()))
    shares = ", ".join(f"{name.removeprefix('staleness_')}: {sum(counts[name]) / total:.0%}" for name in by_age)
    series = {f"{name.removeprefix('staleness_')} old": counts[name] for name in by_age}
    caption = f"Of each step, by how many steps old the weights were that sampled them. In all, {shares}."
    return Plot("Rollouts by age", _stacked(metrics, "rollouts", series), caption, f"Rollouts by age, {shares}")


def judge_distribution(pairs: Sequence[Pair]) -> Plot:
    before, after = _column(pairs, "judge_before"), _column(pairs, "judge_after")
    with matplotlib.rc_context(LOOK):
        figure, axes = axes_of("judge's score", "prompts")
        edges = np.histogram_bin_edges(np.concatenate([before, after]), bins=20)
        middles, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
        for offset, values, colour, label in ((-0.21, before, BEFORE, "before"), (0.21, after, AFTER, "after")):
            counts, _ = np.histogram(values, edges)
            axes.bar(middles + offset * width, counts, width=0.42 * width, color=colour, label=label)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(axes, 2)
        alt = f"Mean {before.mean():.2f} before and {after.mean():.2f} after"
        return Plot("Judge's scores", svg(figure), "Held-out prompts by the judge's score of the whole text.", alt)


def reward_against_judge(pairs: Sequence[Pair]) -> Plot:
    """Change of the reward against change of the judge's score: reward without judge is over-optimisation."""
    reward = _column(pairs, "reward_after") - _column(pairs, "reward_before")
    judge = _column(pairs, "judge_after") - _column(pairs, "judge_before")
    with matplotlib.rc_context(LOOK):
        figure, axes = axes_of("change of reward", "change of judge's score")
        axes.axhline(0, color="#98a2b3", linewidth=0.9)
        axes.axvline(0, color="#98a2b3", linewidth=0.9)
        axes.scatter(reward, judge, s=13, color=AFTER, alpha=0.45, linewidths=0)
        axes.scatter(
            [reward.mean()], [judge.mean()], s=46, color=ACCENT, edgecolors="white", linewidths=1.2, label="mean"
        )
        legend(axes, 1)
        gamed = float(np.mean((reward > 0) & (judge < 0)))
        caption = f"One dot a prompt. Reward up while the judge went down: {gamed:.0%} of the prompts."
        alt = f"Mean change of reward {reward.mean():.2f}, of the judge's score {judge.mean():.2f}"
        return Plot("Does the reward carry over?", svg(figure), caption, alt)


def calibration(predicted: Sequence[float], observed: Sequence[float], counts: Sequence[float]) -> Plot:
    """
    Args:
        predicted, observed, counts: [bins]: mean predicted probability that the first of two completions was preferred,
            share that was, and number of pairs.
    """
    with matplotlib.rc_context(LOOK):
        figure, axes = axes_of("predicted probability", "share preferred")
        axes.plot([0, 1], [0, 1], color="#98a2b3", linewidth=1, linestyle=(0, (4, 3)), label="perfect")
        sizes = 14 + 110 * np.asarray(counts, float) / max(max(counts), 1)
        axes.plot(predicted, observed, color=AFTER, linewidth=1.2, alpha=0.6)
        axes.scatter(
            predicted,
            observed,
            s=sizes,
            color=AFTER,
            edgecolors="white",
            linewidths=0.8,
            label="held-out pairs",
            zorder=3,
        )
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        legend(axes, 2)
        caption = "Larger dots hold more pairs; on the dashed line probabilities mean what they say."
        return Plot("Reward model's calibration", svg(figure), caption, "Predicted against observed preferences")


def over_optimisation(frontier: Frontier) -> Plot:
    """The proxy's and the judge's gain against √KL; on the judge's side the fitted curves and their optimum."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=_WIDE, layout="constrained")
        FigureCanvasSVG(figure)
        for axes, name, label in zip(
            figure.subplots(1, 2), ("proxy", "judge"), ("reward", "judge's score"), strict=True
        ):
            axes.set(xlabel="√KL to the initial policy, √nats", ylabel=f"change of {label}")
            axes.axhline(0, color="#98a2b3", linewidth=0.9)
            for form in _FORMS:
                _points(axes, [point for point in frontier.points if point.form == form], name)
            axes.set_xlim(left=0)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for fitted in frontier.fits:
            _fitted(axes, fitted)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=6, handlelength=1.4)
        caption = (
            f"Means over {frontier.prompts} held-out prompts, relative to the initial policy, with 95 % intervals over "
            "prompts; thin lines follow n and training. Best-of-n stands at the upper bound of its KL, "
            f"log n − (n − 1) / n; of the {frontier.samples} completions of a prompt {frontier.distinct_share:.0%} are "
            "different ones."
        )
        last = {point.form: point for point in frontier.points}
        alt = "; ".join(
            f"{end.name} at {end.kl:.2f} nats: reward {end.proxy_gain:+.2f}, judge {end.judge_gain:+.2f}"
            for end in last.values()
        )
        return Plot("Reward and judge, the farther from the initial policy", svg(figure), caption, alt)


def _points(axes: Axes, points: Sequence[Point], name: str) -> None:
    if not points:
        return
    colour, label = _FORMS[points[0].form]
    d = np.sqrt([point.kl for point in points])
    gain = np.array([getattr(point, f"{name}_gain") for point in points])
    axes.plot(d, gain, color=colour, linewidth=0.8, alpha=0.35)
    axes.errorbar(
        d,
        gain,
        xerr=_reach(d, [tuple(np.sqrt(np.maximum(_ends(p.kl_interval), 0))) for p in points]),
        yerr=_reach(gain, [_ends(getattr(p, f"{name}_gain_interval")) for p in points]),
        fmt="o",
        markersize=4,
        color=colour,
        elinewidth=0.9,
        label=label,
    )


def _fitted(axes: Axes, fitted: Fit) -> None:
    colour, label = _FORMS[fitted.form]
    d, gain, low, high = np.array(fitted.curve).T
    axes.fill_between(d, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(d, gain, color=colour, linewidth=1.3, label=f"fit of {label}")
    if fitted.optimum_d is None or fitted.optimum_gain is None or fitted.optimum_d > fitted.farthest_d:
        return
    ends = np.clip(_ends(fitted.optimum_d_interval), 0, fitted.farthest_d)
    axes.errorbar(
        [fitted.optimum_d],
        [fitted.optimum_gain],
        xerr=_reach(np.array([fitted.optimum_d]), [tuple(ends)]),
        fmt="D",
        markersize=6,
        color=colour,
        markeredgecolor="white",
        elinewidth=2.2,
        label=f"its peak ({label})",
    )


def _ends(interval: Interval) -> tuple[float, float]:
    low, high = interval
    return (np.inf if low is None else low), (np.inf if high is None else high)


def _reach(middle: NDArray[Any], intervals: Sequence[tuple[float, ...]]) -> NDArray[Any]:
    """[2, N]: how far each interval's ends are below and above its middle."""
    low, high = np.array(intervals).T
    reach: NDArray[Any] = np.maximum(np.stack([middle - low, high - middle]), 0)
    return reach


def _curve_plot(curve: Curve, series: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> Plot:
    with matplotlib.rc_context(LOOK):
        figure, axes = axes_of("step", curve.unit)
        for (label, (steps, values)), colour in zip(series.items(), (AFTER, ACCENT), strict=False):
            _draw(axes, steps, values, colour, label)
        if curve.unit.startswith("share"):
            axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            legend(axes, len(series))
        ends = ", ".join(f"{label} from {values[0]:.3g} to {values[-1]:.3g}" for label, (_, values) in series.items())
        return Plot(curve.title, svg(figure), curve.caption, f"{curve.title}: {ends}")


def _draw(axes: Axes, steps: NDArray[Any], values: NDArray[Any], colour: str, label: str) -> None:
    """The values; where there are many, faint ones under their moving average."""
    if len(values) < _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, label=label, marker="o" if len(values) == 1 else None, markersize=4)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    width = len(values) // 40 * 2 + 1
    ones = np.ones(width)
    smooth = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    axes.plot(steps, smooth, color=colour, label=label)


def _stacked(metrics: Metrics, unit: str, series: Mapping[str, Sequence[float]]) -> str:
    """An image of what adds up, step by step; the first of the series below."""
    with matplotlib.rc_context(LOOK):
        figure, axes = axes_of("step", unit)
        _stack(axes, [row["step"] for row in metrics], series)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes, len(series))
        return svg(figure)


def _stack(axes: Axes, steps: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    """One bar a step; where there are many, areas."""
    colours = [_PHASES[number % len(_PHASES)] for number in range(len(series))]
    if len(steps) >= _SMOOTH_FROM:
        axes.stackplot(steps, list(series.values()), labels=list(series), colors=colours, linewidth=0)
        return
    bottom = np.zeros(len(steps))
    for (label, values), colour in zip(series.items(), colours, strict=True):
        axes.bar(steps, values, bottom=bottom, width=0.86, label=label, color=colour)
        bottom += values


def _series(metrics: Metrics, field: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and values of the rows that have a finite value."""
    drawn = [(row["step"], float(row[field])) for row in metrics if isinstance(row.get(field), int | float)]
    drawn = [(step, value) for step, value in drawn if np.isfinite(value)]
    return np.array([step for step, _ in drawn]), np.array([value for _, value in drawn])


def _column(pairs: Sequence[Pair], name: str) -> NDArray[Any]:
    return np.array([getattr(pair, name) for pair in pairs])


def axes_of(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def legend(axes: Axes, entries: int) -> None:
    """Above the axes, where it covers no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(entries, 4), handlelength=1.2, borderaxespad=0.2)


def svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
