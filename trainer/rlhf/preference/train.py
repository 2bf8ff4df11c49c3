"""`rlhf reward-model`: scalar heads on the policy's trunk, trained on rankings and normalised on a frozen set.

    judgments ─ encode, split by prompt ─ fit (the trunk, the members' heads, the annotators)
              ─ assemble (groups of like taste, normalisation) ─ evaluate on held-out prompts ─ save

Ties count in training as the loss says, and not at all in the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.models.compute import set_threads
from rlhf.preference.assemble import Assembled, assemble, save
from rlhf.preference.calibration import Floats, accuracy, calibration_figures, length_only_accuracy
from rlhf.preference.comparisons import Comparison, margins_of
from rlhf.preference.fit import Fitted, fit, remove_fit_state
from rlhf.preference.judged import Judged, read_judged
from rlhf.preference.report import write_report
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.run import Settings

_NOISE_FREE = ("reward_model_accuracy", "length_only_accuracy", "pairs")


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the reward model's folder and returns its figures.

    Raises:
        DataError: judgments that cannot be used, or none that orders two completions on one side of the split.
        ModelError, StorageError, StageFailed: see `rlhf.sft.loop.train` and `rlhf.models`.
    """
    section, out = settings.reward_model, settings.reward_model.out or settings.paths.reward_model
    set_threads(section.threads)
    judged = read_judged(settings)
    fitted = fit(judged.start, judged.training, judged.pad_id, section, settings.paths, out)
    assembled = assemble(fitted, judged, section)
    figures = evaluate(assembled, judged, section)
    save(out, assembled, judged, section, figures)
    remove_fit_state(out, section)
    if section.report:
        write_report(settings, judged, assembled, figures, out)
    return figures | _counts(fitted, judged) | {"mean": assembled.single.mean, "std": assembled.single.std}


def evaluate(assembled: Assembled, judged: Judged, section: RewardModelSettings) -> dict[str, Any]:
    """Figures on held-out prompts, and on noise-free judgments where there are some."""
    figures = _measured(assembled, judged.training, judged.heldout, judged.pad_id, section)
    if judged.noise_free:
        measured = _measured(assembled, judged.training, judged.noise_free, judged.pad_id, section)
        figures |= {f"noise_free_{name}": measured[name] for name in _NOISE_FREE}
    return figures


def length_margins(comparisons: Sequence[Comparison]) -> dict[str, Floats]:
    completions = [text for comparison in comparisons for text in comparison.completions]
    tokens = [len(sequence) for comparison in comparisons for sequence in comparison.token_ids]
    lengths = {
        "characters": [len(text) for text in completions],
        "words": [len(text.split()) for text in completions],
        "tokens": tokens,
    }
    return {name: margins_of(comparisons, np.array(values, dtype=np.float64)) for name, values in lengths.items()}


def _measured(
    assembled: Assembled,
    training: list[Comparison],
    heldout: list[Comparison],
    pad_id: int,
    section: RewardModelSettings,
) -> dict[str, Any]:
    sequences = [sequence for comparison in heldout for sequence in comparison.token_ids]
    margins = margins_of(heldout, assembled.raw_scores(sequences, pad_id, section))
    length_accuracy, length_rule = length_only_accuracy(length_margins(training), length_margins(heldout))
    return {
        "reward_model_accuracy": accuracy(margins),
        "length_only_accuracy": length_accuracy,
        "length_rule": length_rule,
        "pairs": len(margins),
        **calibration_figures(margins),
    }


def _counts(fitted: Fitted, judged: Judged) -> dict[str, Any]:
    trained = fitted.trained
    counts: dict[str, Any] = {"train_loss": trained.loss, "steps": trained.steps}
    for side, comparisons in (("train", judged.training), ("heldout", judged.heldout)):
        ordered = sum(len(comparison.ordered) for comparison in comparisons)
        pairs = sum(len(comparison.ranks) * (len(comparison.ranks) - 1) // 2 for comparison in comparisons)
        counts |= {f"{side}_judgments": len(comparisons), f"{side}_pairs": ordered, f"{side}_ties": pairs - ordered}
    return counts | {"judgments_per_s": len(judged.training) / trained.seconds if trained.seconds else 0.0}
