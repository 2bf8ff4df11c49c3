"""What a frontier says, in sentences: for the log and the report. No torch here, which the report does not need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rlhf.evaluate.results import Fit, Form, Frontier, Interval, Point

FORMS: Mapping[Form, str] = {"best_of_n": "best-of-n", "rl": "PPO"}
"""What people call them."""


def sentences(frontier: Frontier) -> list[str]:
    """What was measured and what was fitted, one sentence each a form."""
    found: list[str] = [_measured(points) for form in FORMS if (points := points_of(frontier, form))]
    found += [_sentence(fitted) for fitted in frontier.fits]
    return found + [f"{FORMS[form]}: no curve was fitted: {why}." for form, why in frontier.refused.items()]


def points_of(frontier: Frontier, form: Form) -> list[Point]:
    return [point for point in frontier.points if point.form == form]


def _measured(points: Sequence[Point]) -> str:
    """Where the judge's score was highest, and what came of it afterwards. Needs no curve to be right."""
    best, last = max(points, key=lambda point: point.judge_gain), points[-1]
    sentence = f"{FORMS[best.form]}: measured, the judge's score was highest at {best.name}, {_judged(best)}"
    if last is best:
        return f"{sentence}, the last point."
    change = f"the reward {last.proxy_gain - best.proxy_gain:+.2f} from there"
    return f"{sentence}; the last, {last.name}, is at {_judged(last)}, {change}."


def _judged(point: Point) -> str:
    return f"√KL {math.sqrt(point.kl):.2f}, with {point.judge_gain:+.3f} {_bracket(point.judge_gain_interval, 3)}"


def _sentence(fitted: Fit) -> str:
    name, reach = FORMS[fitted.form], f"√KL {fitted.farthest_d:.2f}, the farthest point"
    share = f"in {fitted.optimum_share:.0%} of the resamples it turns before {reach}"
    misses = f"it misses the points by {fitted.misfit:.3f}"
    if fitted.optimum_d is None or fitted.optimum_gain is None:
        return f"{name}: the fitted curve of the judge's score has no peak in reach; {share}; {misses}."
    gain = f"{fitted.optimum_gain:+.3f} {_bracket(fitted.optimum_gain_interval, 3)}"
    peak = f"√KL {fitted.optimum_d:.2f} {_bracket(fitted.optimum_d_interval, 2)}, with {gain}"
    if fitted.optimum_d > fitted.farthest_d:
        rises = f"{name}: the fitted curve of the judge's score still rises at {reach}"
        return f"{rises}; its peak, at {peak}, lies beyond; {misses}."
    return f"{name}: the fitted curve of the judge's score has its peak at {peak}; {share}; {misses}."


def _bracket(interval: Interval, digits: int) -> str:
    return "[" + ", ".join("∞" if end is None else f"{end:.{digits}f}" for end in interval) + "]"
