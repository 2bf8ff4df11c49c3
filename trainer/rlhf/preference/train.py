"""`rlhf reward-model`: scalar heads on the policy's trunk, trained on rankings and normalised on a frozen set.

    judgments ─ encode, split by prompt ─ fit (the trunk, the members' heads, the annotators)
              ─ assemble (groups of like taste, normalisation) ─ evaluate on held-out prompts ─ save

Ties count in training as the loss says, and not at all in the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf.errors import DataError
from rlhf.feedback.judgments import Judgment, read_judgments
from rlhf.feedback.snapshots import is_snapshot, read_snapshot, snapshot_sha256
from rlhf.models.compute import set_threads
from rlhf.models.folders import start_model
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import load_tokenizer, pad_token_id
from rlhf.preference.assemble import Assembled, assemble, save
from rlhf.preference.calibration import Floats, accuracy, calibration_figures, length_only_accuracy
from rlhf.preference.comparisons import Comparison, encode, split_by_prompt
from rlhf.preference.fit import Fitted, fit, remove_fit_state
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.run import Settings

_NOISE_FREE = ("reward_model_accuracy", "length_only_accuracy", "pairs")


@dataclass(frozen=True)
class Judged:
    """The judgments of a run, as token sequences on either side of the split."""

    source: Path
    snapshot_sha256: str
    """Of all judgments that the source holds, as a snapshot of them has it."""
    training: list[Comparison]
    heldout: list[Comparison]
    noise_free: list[Comparison]
    """Of prompts that neither side has; may be empty."""
    start: Path
    """Folder of the language model."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        return pad_token_id(self.tokenizer)


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the reward model's folder and returns its figures.

    Raises:
        DataError: judgments that cannot be used, or none that orders two completions on one side of the split.
        ModelError, StorageError, StageFailed: see `rlhf.sft.loop.train` and `rlhf.models`.
    """
    section, out = settings.reward_model, settings.reward_model.out or settings.paths.reward_model
    set_threads(section.threads)
    judged = _judged(settings)
    fitted = fit(judged.start, judged.training, judged.pad_id, section, settings.paths, out)
    assembled = assemble(fitted, judged, section)
    figures = evaluate(assembled, judged, section)
    save(out, assembled, judged, section, figures)
    remove_fit_state(out, section)
    if section.report:
        from rlhf.preference.report import write_report  # ablations and plots, which nobody else pays for

        write_report(settings, judged, assembled, figures, out)
    return figures | _counts(fitted, judged) | {"mean": assembled.single.mean, "std": assembled.single.std}


def evaluate(assembled: Assembled, judged: Judged, section: RewardModelSettings) -> dict[str, Any]:
    """Figures on held-out prompts, and on noise-free judgments where there are some."""
    figures = _measured(assembled, judged.training, judged.heldout, judged.pad_id, section)
    if judged.noise_free:
        measured = _measured(assembled, judged.training, judged.noise_free, judged.pad_id, section)
        figures |= {f"noise_free_{name}": measured[name] for name in _NOISE_FREE}
    return figures


def margins_of(comparisons: Sequence[Comparison], values: Floats) -> Floats:
    """Value of the better less that of the worse completion, for every ordered pair; `values` lie end to end."""
    offset, margins = 0, []
    for comparison in comparisons:
        margins += [values[offset + better] - values[offset + worse] for better, worse in comparison.ordered]
        offset += len(comparison.ranks)
    return _floats(margins)


def length_margins(comparisons: Sequence[Comparison]) -> dict[str, Floats]:
    completions = [text for comparison in comparisons for text in comparison.completions]
    tokens = [len(sequence) for comparison in comparisons for sequence in comparison.token_ids]
    lengths = {
        "characters": [len(text) for text in completions],
        "words": [len(text.split()) for text in completions],
        "tokens": tokens,
    }
    return {name: margins_of(comparisons, _floats(values)) for name, values in lengths.items()}


def _judged(settings: Settings) -> Judged:
    section = settings.reward_model
    source, start = section.comparisons or settings.paths.comparisons, section.init_from or start_model(settings)
    tokenizer, context = load_tokenizer(start), RewardModel.new(start).context_tokens
    max_length = min(context or section.max_length, section.max_length)

    def encoded(judgments: Sequence[Judgment], path: Path) -> list[Comparison]:
        return encode(judgments, tokenizer, max_length, path, context)

    judgments = read_snapshot(source).judgments if is_snapshot(source) else read_judgments(source)
    training, heldout = split_by_prompt(encoded(judgments, source), section.heldout_fraction, section.seed)
    _check_ordered(source, training, heldout)
    beside = section.heldout_comparisons or settings.paths.heldout_comparisons
    asked = section.heldout_comparisons is not None or beside.exists()
    noise_free = encoded(read_judgments(beside), beside) if asked else []
    return Judged(source, snapshot_sha256(judgments), training, heldout, noise_free, start, tokenizer)


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


def _floats(values: Sequence[float]) -> Floats:
    return np.array(values, dtype=np.float64)


def _check_ordered(source: Path, training: Sequence[Comparison], heldout: Sequence[Comparison]) -> None:
    for side, comparisons in (("training", training), ("held-out", heldout)):
        if not any(comparison.ordered for comparison in comparisons):
            raise DataError(f"no judgment on the {side} side orders two completions; all are ties", path=source)


def _counts(fitted: Fitted, judged: Judged) -> dict[str, Any]:
    trained = fitted.trained
    counts: dict[str, Any] = {"train_loss": trained.loss, "steps": trained.steps}
    for side, comparisons in (("train", judged.training), ("heldout", judged.heldout)):
        ordered = sum(len(comparison.ordered) for comparison in comparisons)
        pairs = sum(len(comparison.ranks) * (len(comparison.ranks) - 1) // 2 for comparison in comparisons)
        counts |= {f"{side}_judgments": len(comparisons), f"{side}_pairs": ordered, f"{side}_ties": pairs - ordered}
    return counts | {"judgments_per_s": len(judged.training) / trained.seconds if trained.seconds else 0.0}
