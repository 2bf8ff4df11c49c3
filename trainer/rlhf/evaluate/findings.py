"""What a frontier says, in sentences: for the log and the report. No torch here, which the report does not need."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.evaluate.results import Fit, Form, Frontier, Interval

FORMS: Mapping[Form, str] = {"best_of_n": "best-of-n", "rl": "PPO"}
"""What people call them."""


def sentences(frontier: Frontier) -> list[str]:
    """What was found, one sentence a form."""
    found: list[str] = [_sentence(fitted) for fitted in frontier.fits]
    return found + [f"{FORMS[form]}: no curve was fitted: {why}." for form, why in frontier.refused.items()]


def _sentence(fitted: Fit) -> str:
    name, reach = FORMS[fitted.form], f"√KL {fitted.farthest_d:.2f}, the farthest point"
    share = f"in {fitted.optimum_share:.0%} of the resamples it turns before {reach}"
    if fitted.optimum_d is None or fitted.optimum_gain is None:
        return f"{name}: the fitted curve of the judge's score has no peak; {share}."
    gain = f"{fitted.optimum_gain:+.3f} {_bracket(fitted.optimum_gain_interval, 3)}"
    peak = f"√KL {fitted.optimum_d:.2f} {_bracket(fitted.optimum_d_interval, 2)}, with {gain}"
    if fitted.optimum_d > fitted.farthest_d:
        return (
            f"{name}: the fitted curve of the judge's score still rises at {reach}; its peak, at {peak}, lies beyond."
        )
    return f"{name}: the judge's score is predicted to peak at {peak}; {share}."


def _bracket(interval: Interval, digits: int) -> str:
    return "[" + ", ".join("∞" if end is None else f"{end:.{digits}f}" for end in interval) + "]"
