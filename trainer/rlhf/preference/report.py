"""`rlhf reward-model --report`: what a reward model knows, and whose judgments it knows it from; HTML and JSON.

Everything is measured on held-out prompts. Disagreement is no noise to be averaged away, so accuracy is also shown
where annotators agree and where they do not, beside what another annotator would reach there: the ceiling.
"""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.models.folders import storage_errors, write_json
from rlhf.preference.assemble import Assembled, assemble
from rlhf.preference.calibration import Floats, accuracy, brier, calibration_figures
from rlhf.preference.comparisons import Comparison, margins_of
from rlhf.preference.fit import fit, remove_fit_state
from rlhf.preference.judged import Judged
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.run import Settings

Report = dict[str, Any]


def write_report(
    settings: Settings, judged: Judged, assembled: Assembled, figures: Mapping[str, Any], out: Path
) -> None:
    """Writes `<out>-report.json` and `<out>-report.html`.

    Raises:
        StorageError: they cannot be written.
    """
    section = settings.reward_model
    report = report_of(assembled, judged, section) | {
        "accuracy": figures["reward_model_accuracy"],
        "length_only": {"accuracy": figures["length_only_accuracy"], "rule": figures["length_rule"]},
        "ablations": ablations(settings, judged, out),
    }
    write_json(out.with_name(f"{out.name}-report.json"), report)
    page = out.with_name(f"{out.name}-report.html")
    with storage_errors(page):
        page.write_text(as_html(report), encoding="utf-8")


def report_of(assembled: Assembled, judged: Judged, section: RewardModelSettings) -> Report:
    """Everything but the ablations."""
    heldout = judged.heldout
    values = assembled.raw_scores([sequence for each in heldout for sequence in each.token_ids], judged.pad_id, section)
    ends = np.cumsum([len(each.ranks) for each in heldout])
    scores = np.split(values, ends[:-1])
    margins = np.concatenate([_margins(each, own) for each, own in zip(heldout, scores, strict=True)])
    return {
        "loss": section.loss,
        "annotators_modelled": section.annotators,
        "members": section.members,
        "pairs": len(margins),
        "brier": brier(margins),
        **calibration_figures(margins),
        "strata": strata(heldout, scores),
        "by_policy_version": by(heldout, scores, lambda each: each.judgment.policy_version),
        "by_annotator": by(heldout, scores, lambda each: each.judgment.annotator),
        "annotators": _annotators(assembled),
        "groups": [] if assembled.groups is None else assembled.groups.as_json(),
        "combine": section.combine if assembled.groups is not None else None,
    }


def strata(comparisons: Sequence[Comparison], scores: Sequence[Floats]) -> list[dict[str, Any]]:
    """By how the annotators of a pair of completions agree: accuracy of the model, and of the other annotators.

    A pair is `unanimous` (all order it alike), `divided` (they do not), `tied` (as many for one as for the other, or
    all call it even: no side to agree with), or `single` (one annotator alone saw it). The ceiling is what an annotator
    is told by the others' majority, each left out in turn; an even majority is half right.
    """
    found: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
    for votes, margin in _votes(comparisons, scores).values():
        cast = [vote for vote in votes if vote]
        for vote in cast:
            others = sum(votes) - vote
            ceiling = None if len(votes) == 1 else 0.5 * (1 + vote * float(np.sign(others)))
            found[_stratum(votes)].append((0.5 * (1 + vote * float(np.sign(margin))), ceiling))
        if not cast:
            found["tied"].append((0.5, None))
    return [_stratum_row(name, found[name]) for name in ("unanimous", "divided", "tied", "single") if name in found]


def by(
    comparisons: Sequence[Comparison], scores: Sequence[Floats], key: Callable[[Comparison], str]
) -> list[dict[str, Any]]:
    """Accuracy by whatever the key says of a judgment; those without an ordered pair are left out."""
    margins: dict[str, list[float]] = defaultdict(list)
    for each, own in zip(comparisons, scores, strict=True):
        margins[key(each)] += _margins(each, own).tolist()
    return [
        {"name": name, "pairs": len(own), "accuracy": accuracy(np.array(own))}
        for name, own in sorted(margins.items())
        if own
    ]


def ablations(settings: Settings, judged: Judged, out: Path) -> list[dict[str, Any]]:
    """The same training with each of the losses, and with the losses' default but all annotators alike."""
    section, rows = settings.reward_model, []
    ways: dict[str, dict[str, Any]] = {loss: {"loss": loss} for loss in section.ablations}
    if section.annotators != "none":
        ways[f"{section.loss}, all annotators alike"] = {"annotators": "none", "position_bias": False}
    for number, (name, changes) in enumerate(ways.items()):
        # One member and its own folder of checkpoints: what is compared is the loss.
        own = section.model_copy(update={"members": 1, "report": False, **changes})
        place = out.with_name(f"{out.name}-ablation-{number}")
        fitted = fit(judged.start, judged.training, judged.pad_id, own, settings.paths, place)
        remove_fit_state(place, own)
        model = assemble(fitted, judged, own)
        rows.append({"name": name, **_heldout_figures(model, judged, own)})
    return rows


def as_html(report: Report) -> str:
    """A page without scripts; its plot is inside."""
    parts = [
        _table("Held out", ["", ""], _summary(report)),
        _table(
            "By agreement",
            ["pair", "judgments", "accuracy", "of other annotators"],
            [[row["stratum"], row["judgments"], row["accuracy"], row["ceiling"]] for row in report["strata"]],
        ),
        f"<h2>Calibration</h2><img alt='Predicted against observed preference' src='{_calibration_plot(report)}'>",
        _table(
            "By policy version",
            ["version", "pairs", "accuracy"],
            [[row["name"], row["pairs"], row["accuracy"]] for row in report["by_policy_version"]],
        ),
        _table("Annotators", _ANNOTATOR_COLUMNS, [_annotator_row(name, row) for name, row in _people(report)]),
        _table(
            "Groups of like taste",
            ["share", "annotators"],
            [[group["share"], ", ".join(group["annotators"])] for group in report["groups"]],
        ),
        _table(
            "Losses",
            ["trained with", "accuracy", "NLL", "Brier", "ECE"],
            [[row[name] for name in ("name", "accuracy", "nll", "brier", "ece")] for row in report["ablations"]],
        ),
    ]
    return _PAGE.format(body="\n".join(part for part in parts if part))


def _votes(
    comparisons: Sequence[Comparison], scores: Sequence[Floats]
) -> dict[tuple[str, str, str], tuple[list[int], float]]:
    """By pair of texts: each judgment's vote (1 the first, -1 the second, 0 even) and the model's margin."""
    found: dict[tuple[str, str, str], tuple[list[int], float]] = {}
    for each, own in zip(comparisons, scores, strict=True):
        for i, j in combinations(range(len(each.ranks)), 2):
            first, second = sorted((i, j), key=lambda k: each.completions[k])
            key = (each.prompt, each.completions[first], each.completions[second])
            vote = int(np.sign(each.ranks[second] - each.ranks[first]))
            found.setdefault(key, ([], float(own[first] - own[second])))[0].append(vote)
    return found


def _stratum(votes: Sequence[int]) -> str:
    if len(votes) == 1:
        return "single"
    if sum(votes) == 0:
        return "tied"
    return "unanimous" if abs(sum(votes)) == len(votes) else "divided"


def _stratum_row(name: str, found: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
    ceilings = [ceiling for _, ceiling in found if ceiling is not None]
    return {
        "stratum": name,
        "judgments": len(found),
        "accuracy": float(np.mean([right for right, _ in found])),
        "ceiling": float(np.mean(ceilings)) if ceilings else None,
    }


def _margins(comparison: Comparison, scores: Floats) -> Floats:
    return np.array([scores[better] - scores[worse] for better, worse in comparison.ordered], dtype=np.float64)


def _heldout_figures(model: Assembled, judged: Judged, section: RewardModelSettings) -> dict[str, float]:
    sequences = [sequence for each in judged.heldout for sequence in each.token_ids]
    margins = margins_of(judged.heldout, model.raw_scores(sequences, judged.pad_id, section))
    figures = calibration_figures(margins)
    return {"accuracy": accuracy(margins), "brier": brier(margins), "nll": figures["nll"], "ece": figures["ece"]}


def _annotators(assembled: Assembled) -> dict[str, Any]:
    return {
        name: {**evidence.as_json(), "shares": assembled.reliability.get(name)}
        for name, evidence in assembled.evidence.items()
    }


def _summary(report: Report) -> list[list[Any]]:
    length = report["length_only"]
    return [
        ["accuracy", report["accuracy"]],
        [f"by length alone ({length['rule']})", length["accuracy"]],
        ["NLL, nats a pair", report["nll"]],
        ["Brier", report["brier"]],
        ["expected calibration error", report["ece"]],
        ["pairs", report["pairs"]],
        ["loss", report["loss"]],
        ["annotators", report["annotators_modelled"]],
        ["members", report["members"]],
        *([["groups combined by", report["combine"]]] if report["combine"] else []),
    ]


_ANNOTATOR_COLUMNS = ["annotator", "class", "fit", "gold", "repeats", "fitted shares", "held-out accuracy"]


def _people(report: Report) -> list[tuple[str, dict[str, Any]]]:
    accuracies = {row["name"]: row["accuracy"] for row in report["by_annotator"]}
    return [(name, {**row, "accuracy": accuracies.get(name)}) for name, row in report["annotators"].items()]


def _annotator_row(name: str, row: dict[str, Any]) -> list[Any]:
    shares = ", ".join(f"{kind} {share:.2f}" for kind, share in (row["shares"] or {}).items())
    rates = [_rate(row[what]) for what in ("fit", "gold", "repeats")]
    return [name, row["class"], *rates, shares, row["accuracy"]]


def _rate(count: dict[str, Any]) -> str:
    if count["rate"] is None:
        return "–"
    low, high = count["interval"]
    return f"{count['rate']:.2f} ({low:.2f} to {high:.2f})"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _calibration_plot(report: Report) -> str:
    """As a data URI."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    bins = report["calibration"]
    axes.plot([each["predicted"] for each in bins], [each["observed"] for each in bins], marker="o", color="C0")
    axes.set(xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Reward model</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; }}
</style></head><body><h1>Reward model</h1>
{body}
</body></html>
"""
