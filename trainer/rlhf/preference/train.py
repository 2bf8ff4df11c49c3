"""`rlhf reward-model`: a scalar head on the policy's trunk, trained on rankings and normalised on a frozen set.

Ties count as targets of one half in training and not at all in the figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import DataError
from rlhf.feedback.judgments import read_judgments
from rlhf.models.causal import disable_dropout
from rlhf.models.compute import set_threads
from rlhf.models.folders import sha256_file, start_model
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel, ended
from rlhf.models.tokenizer import load_tokenizer, pad_token_id
from rlhf.preference.calibration import Floats, accuracy, calibration_figures, length_only_accuracy
from rlhf.preference.comparisons import (
    Comparison,
    ComparisonBatch,
    batch_of,
    by_completions,
    encode,
    sha256_of,
    split_by_prompt,
)
from rlhf.preference.loss import bradley_terry_sum
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.run import Settings
from rlhf.sft.batches import batches_per_epoch, shuffled_batches
from rlhf.sft.loop import Job, Trained, autocast, remove_training_state, state_folder_of, train

REFERENCE_SET_SIZE = 512
_NOISE_FREE = ("reward_model_accuracy", "length_only_accuracy", "pairs")


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the reward model's folder and returns its figures.

    Raises:
        DataError: judgments that cannot be used, or none that orders two completions on one side of the split.
        ModelError, StorageError, StageFailed: see `rlhf.sft.loop.train` and `rlhf.models`.
    """
    section, out = settings.reward_model, settings.reward_model.out or settings.paths.reward_model
    set_threads(section.threads)
    source, folder = section.comparisons or settings.paths.comparisons, section.init_from or start_model(settings)
    model, tokenizer = RewardModel.new(folder, seed=section.seed, device=section.device), load_tokenizer(folder)
    disable_dropout(model)
    context = model.context_tokens
    max_length = min(context or section.max_length, section.max_length)
    comparisons = encode(read_judgments(source), tokenizer, max_length, source, context)
    training, heldout = split_by_prompt(comparisons, section.heldout_fraction, section.seed)
    _check_ordered(source, training, heldout)
    noise_free = _noise_free(settings, tokenizer, max_length, context)
    trained = train(_job(settings, model.train(), training, pad_token_id(tokenizer), out))
    model.eval()
    reference = reference_set(training, section.seed)
    figures = _evaluate(model, tokenizer, training, heldout, section)
    if noise_free:
        measured = _evaluate(model, tokenizer, training, noise_free, section)
        figures |= {f"noise_free_{name}": measured[name] for name in _NOISE_FREE}
    _normalise(model, tokenizer, reference, section)
    model.facts = {
        "reference_set_sha256": hashlib.sha256(json.dumps(reference).encode()).hexdigest(),
        "comparisons_sha256": sha256_file(source) if source.is_file() else sha256_of(comparisons),
        "figures": figures,
    }
    model.save(out, tokenizer, [{"prompt": prompt, "completion": completion} for prompt, completion in reference])
    remove_training_state(state_folder_of(out))
    return figures | _counts(trained, training, heldout) | {"mean": model.mean, "std": model.std}


def _noise_free(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, max_length: int, context: int | None
) -> list[Comparison]:
    """Of prompts that `comparisons` does not have; empty if there are none."""
    source = settings.reward_model.heldout_comparisons or settings.paths.heldout_comparisons
    if settings.reward_model.heldout_comparisons is None and not source.exists():
        return []
    return encode(read_judgments(source), tokenizer, max_length, source, context)


def reference_set(training: Sequence[Comparison], seed: int) -> list[tuple[str, str]]:
    """Prompts and completions whose scores get mean 0 and std 1: a fixed draw from the training judgments."""
    distinct = sorted({(each.prompt, completion) for each in training for completion in each.completions})
    drawn = np.random.default_rng(seed).permutation(len(distinct))[:REFERENCE_SET_SIZE]
    return [distinct[index] for index in sorted(drawn.tolist())]


@torch.no_grad()
def raw_scores(
    model: RewardModel, sequences: Sequence[Sequence[int]], pad_id: int, section: RewardModelSettings
) -> Floats:
    """[N], in batches of sequences of like length."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores = np.zeros(len(sequences))
    with autocast(section):
        for start in range(0, len(order), 64):
            some = order[start : start + 64]
            ids, mask = pad([sequences[index] for index in some], pad_id)
            scores[some] = model.raw_scores(ids.to(model.device), mask.to(model.device)).cpu().numpy()
    return scores


def _job(
    settings: Settings, model: RewardModel, training: list[Comparison], pad_id: int, out: Path
) -> Job[ComparisonBatch]:
    section = settings.reward_model
    groups = by_completions(training)
    per_epoch = batches_per_epoch(len(groups), section.prompts_per_batch)
    batch = shuffled_batches(groups, section.prompts_per_batch, section.seed)
    return Job(
        name="reward-model",
        model=model,
        loss=_loss(model),
        micro_batch=lambda index: batch_of(batch(index), pad_id),
        micro_batches=per_epoch * section.epochs,
        settings=section,
        state_folder=state_folder_of(out),
        tensorboard=settings.paths.tensorboard / "reward-model",
        data={"comparisons": sha256_of(training)},
    )


def _loss(model: RewardModel) -> Callable[[ComparisonBatch], Tensor]:
    return lambda batch: bradley_terry_sum(model.raw_scores(batch.input_ids, batch.attention_mask), batch.pairs)


def _evaluate(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    training: list[Comparison],
    heldout: list[Comparison],
    section: RewardModelSettings,
) -> dict[str, Any]:
    sequences = [sequence for comparison in heldout for sequence in comparison.token_ids]
    scores = raw_scores(model, sequences, pad_token_id(tokenizer), section)
    margins = _margins(heldout, scores)
    length_accuracy, length_rule = length_only_accuracy(_length_margins(training), _length_margins(heldout))
    return {
        "reward_model_accuracy": accuracy(margins),
        "length_only_accuracy": length_accuracy,
        "length_rule": length_rule,
        "pairs": len(margins),
        **calibration_figures(margins),
    }


def _normalise(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: Sequence[tuple[str, str]],
    section: RewardModelSettings,
) -> None:
    prompts = tokenizer([prompt for prompt, _ in reference]).input_ids
    completions = tokenizer([completion for _, completion in reference], add_special_tokens=False).input_ids
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    sequences = [ended(ids, tokenizer.eos_token_id, model.context_tokens) for ids in whole]
    model.normalise(torch.from_numpy(raw_scores(model, sequences, pad_token_id(tokenizer), section)))


def _margins(comparisons: Sequence[Comparison], values: Floats) -> Floats:
    """Value of the better less that of the worse completion, for every ordered pair; `values` lie end to end."""
    offsets = np.cumsum([0, *(len(comparison.ranks) for comparison in comparisons)])
    pairs = [
        (offset + better, offset + worse)
        for offset, comparison in zip(offsets[:-1].tolist(), comparisons, strict=True)
        for better, worse in comparison.ordered
    ]
    better, worse = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return values[better] - values[worse]


def _length_margins(comparisons: Sequence[Comparison]) -> dict[str, Floats]:
    completions = [text for comparison in comparisons for text in comparison.completions]
    tokens = [len(sequence) for comparison in comparisons for sequence in comparison.token_ids]
    lengths = {
        "characters": [len(text) for text in completions],
        "words": [len(text.split()) for text in completions],
        "tokens": tokens,
    }
    return {name: _margins(comparisons, np.array(values, dtype=np.float64)) for name, values in lengths.items()}


def _check_ordered(source: Path, training: Sequence[Comparison], heldout: Sequence[Comparison]) -> None:
    for side, comparisons in (("training", training), ("held-out", heldout)):
        if not any(comparison.ordered for comparison in comparisons):
            raise DataError(f"no judgment on the {side} side orders two completions; all are ties", path=source)


def _counts(trained: Trained, training: Sequence[Comparison], heldout: Sequence[Comparison]) -> dict[str, Any]:
    counts: dict[str, Any] = {"train_loss": trained.loss, "steps": trained.steps}
    for side, comparisons in (("train", training), ("heldout", heldout)):
        ordered = sum(len(comparison.ordered) for comparison in comparisons)
        pairs = sum(len(comparison.ranks) * (len(comparison.ranks) - 1) // 2 for comparison in comparisons)
        counts |= {f"{side}_judgments": len(comparisons), f"{side}_pairs": ordered, f"{side}_ties": pairs - ordered}
    return counts | {"judgments_per_s": len(training) / trained.seconds if trained.seconds else 0.0}
