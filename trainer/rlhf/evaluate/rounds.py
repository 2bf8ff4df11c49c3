"""Rounds of feedback in the report: a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from rlhf.evaluate.plots import ACCENT, AFTER, LOOK, Plot, axes_of, legend, svg

HEADINGS = (
    *("Round", "PPO step", "Judgments", "Chosen by"),
    *("Accuracy in service", "refreshed", "Paired change", "Promoted", "New policy preferred", "Reward's change"),
)


def rows(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One each, as `HEADINGS` says."""
    return [
        (
            str(one["round"]),
            str(one["policy_step"]),
            str(one.get("judgments", "")),
            one.get("chosen_by", "audit only"),
            _number(one, "accuracy_in_service", 3),
            _number(one, "accuracy_new", 3),
            _interval(one, "accuracy_gain", 3),
            "" if "promoted" not in one else "yes" if one["promoted"] else "no",
            f"{_number(one['audit'], 'win_rate', 2)} {_interval(one['audit'], 'win_rate', 2)}".strip(),
            f"{_number(one['audit'], 'reward_gain', 2)} {_interval(one['audit'], 'reward_gain', 2)}".strip(),
        )
        for one in rounds
    ]


def audits(rounds: Sequence[Mapping[str, Any]]) -> Plot | None:
    """How often the judges prefer the policy of a step to that of the round before. None: there was no audit."""
    found = [one for one in rounds if one["audit"]["pairs"]]
    if not found:
        return None
    steps = [one["policy_step"] for one in found]
    rates = [one["audit"]["win_rate"] for one in found]
    lows, highs = zip(*(one["audit"]["win_rate_interval"] for one in found), strict=True)
    with matplotlib.rc_context(LOOK):
        figure, axes = axes_of("step", "share preferred")
        axes.axhline(0.5, color="#98a2b3", linewidth=1, linestyle=(0, (4, 3)), label="no difference")
        errors = [
            [r - low for r, low in zip(rates, lows, strict=True)],
            [h - r for r, h in zip(rates, highs, strict=True)],
        ]
        axes.errorbar(steps, rates, yerr=errors, fmt="none", ecolor=AFTER, capsize=3)
        colours = [ACCENT if one["audit"]["over_optimised"] else AFTER for one in found]
        axes.scatter(steps, rates, color=colours, zorder=3, label="new against the round before")
        axes.set_ylim(0, 1)
        legend(axes, 2)
        last = found[-1]["audit"]
        alt = f"The last one: {last['win_rate']:.2f} of {last['pairs']} pairs"
        return Plot("Blind audits", svg(figure), "Judges compare the policy with its predecessor, blindly.", alt)


def _number(figures: Mapping[str, Any], name: str, digits: int) -> str:
    return f"{figures[name]:.{digits}f}".replace("-", "−") if name in figures else ""


def _interval(figures: Mapping[str, Any], name: str, digits: int) -> str:
    if f"{name}_interval" not in figures:
        return ""
    low, high = (f"{end:.{digits}f}".replace("-", "−") for end in figures[f"{name}_interval"])
    return f"[{low}, {high}]"
