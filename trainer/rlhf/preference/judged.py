"""What a reward model is trained and measured on: a run's judgments, encoded, on either side of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf.errors import DataError
from rlhf.feedback.judgments import Judgment, read_judgments
from rlhf.feedback.snapshots import is_snapshot, read_snapshot, snapshot_sha256
from rlhf.feedback.withdrawn import without_withdrawn
from rlhf.models.folders import start_model
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import load_tokenizer, pad_token_id
from rlhf.preference.comparisons import Comparison, encode, split_by_prompt
from rlhf.settings.run import Settings


@dataclass(frozen=True)
class Judged:
    """The judgments of a run, as token sequences on either side of the split."""

    source: Path
    snapshot_sha256: str
    """Of all judgments that the source holds, but for those of who has withdrawn, as a snapshot of them has it."""
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


def read_judged(settings: Settings) -> Judged:
    """
    Raises:
        DataError: judgments that cannot be used, or none that orders two completions on one side of the split.
        ModelError: the folder that training starts from holds no language model.
    """
    section = settings.reward_model
    source, start = section.comparisons or settings.paths.comparisons, section.init_from or start_model(settings)
    tokenizer, context = load_tokenizer(start), RewardModel.new(start).context_tokens
    max_length = min(context or section.max_length, section.max_length)

    def encoded(judgments: Sequence[Judgment], path: Path) -> list[Comparison]:
        return encode(judgments, tokenizer, max_length, path, context)

    found = read_snapshot(source).judgments if is_snapshot(source) else read_judgments(source)
    judgments = without_withdrawn(settings, found)
    training, heldout = split_by_prompt(encoded(judgments, source), section.heldout_fraction, section.seed)
    _check_ordered(source, training, heldout)
    beside = section.heldout_comparisons or settings.paths.heldout_comparisons
    asked = section.heldout_comparisons is not None or beside.exists()
    noise_free = encoded(without_withdrawn(settings, read_judgments(beside)), beside) if asked else []
    return Judged(source, snapshot_sha256(judgments), training, heldout, noise_free, start, tokenizer)


def _check_ordered(source: Path, training: Sequence[Comparison], heldout: Sequence[Comparison]) -> None:
    for side, comparisons in (("training", training), ("held-out", heldout)):
        if not any(comparison.ordered for comparison in comparisons):
            raise DataError(f"no judgment on the {side} side orders two completions; all are ties", path=source)
