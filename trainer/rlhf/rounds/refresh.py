"""A reward model from all judgments so far, and reward models in this process, to compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf.errors import ModelError
from rlhf.feedback.judgments import Judgment
from rlhf.feedback.snapshots import load_snapshot, snapshot_of, write_snapshot
from rlhf.models.padding import pad
from rlhf.models.reward import REFERENCE_SET_FILE, RewardModel, ended
from rlhf.models.tokenizer import load_tokenizer, pad_token_id
from rlhf.preference import train
from rlhf.reward.aggregate import aggregation_of
from rlhf.reward.head import RewardHead
from rlhf.reward.requests import Texts
from rlhf.settings.run import Settings

Doubles = NDArray[np.float64]
AT_ONCE = 64


def first_model(settings: Settings) -> Path:
    """The run's first reward model, on whose reference set all later ones are normalised.

    Raises:
        ModelError: it has no reference set.
    """
    folder = settings.reward.model or settings.paths.reward_model
    if not (folder / REFERENCE_SET_FILE).is_file():
        raise ModelError(
            f"{folder}: has no {REFERENCE_SET_FILE}, on which refreshed reward models would keep its scale; train it "
            "with `rlhf reward-model`, or leave feedback.rounds out"
        )
    return folder


def first_judgments(settings: Settings) -> list[Judgment]:
    """What the first reward model was trained on, as far as the run has it."""
    source = settings.reward_model.comparisons or settings.paths.comparisons
    return list(load_snapshot(source).judgments) if source.exists() else []


def refresh(settings: Settings, judgments: Sequence[Judgment], folder: Path) -> Mapping[str, Any]:
    """Trains on the judgments from the run's start model, as `rlhf reward-model` does, and returns its figures.

    Args:
        folder: gets `judgments/`, the snapshot, and `reward-model/`.
    """
    snapshot = folder / "judgments"
    write_snapshot(snapshot, snapshot_of(judgments, [folder.name]))
    ours = {
        "comparisons": snapshot,
        "out": folder / "reward-model",
        "reference_set": first_model(settings),
        "threads": settings.feedback.threads,
        "report": False,
    }
    section = settings.reward_model.model_copy(update=ours)
    return train.run(settings.model_copy(update={"reward_model": section}))


def scores_of(settings: Settings, folder: Path, judgments: Sequence[Judgment]) -> list[Doubles]:
    """[K] of each judgment's completions, as the reward service would score their texts."""
    reward = settings.reward
    head = RewardHead.load(folder, reward.device, reward.dtype, settings.feedback.threads, aggregation_of(reward))
    texts = [Texts(one.prompt, text) for one in judgments for text in one.texts]
    readings = [head.reading(item) for item in head.encode(texts)]
    parts = [readings[start : start + AT_ONCE] for start in range(0, len(readings), AT_ONCE)]
    scores = np.array([one.score for part in parts for one in head.forward(part)])
    return np.split(scores, np.cumsum([len(one.texts) for one in judgments])[:-1])


@torch.no_grad()
def features_of(
    settings: Settings, folder: Path, judgments: Sequence[Judgment]
) -> tuple[dict[tuple[str, str], Doubles], Doubles]:
    """What the head reads of each (prompt, completion), [H], and the head itself, [H]."""
    reward, tokenizer = settings.reward, load_tokenizer(folder)
    model, pad_id = RewardModel.load(folder, device=reward.device, dtype=reward.dtype), pad_token_id(tokenizer)
    texts = sorted({(one.prompt, text) for one in judgments for text in one.texts})
    whole = [
        tokenizer(prompt).input_ids + tokenizer(text, add_special_tokens=False).input_ids if text
        else tokenizer(prompt).input_ids
        for prompt, text in texts
    ]  # fmt: skip
    sequences = [ended(ids, tokenizer.eos_token_id, model.context_tokens) for ids in whole]
    rows = []
    for start in range(0, len(sequences), AT_ONCE):
        ids, mask = pad(sequences[start : start + AT_ONCE], pad_id)
        rows.append(model.last_hidden(ids.to(model.device), mask.to(model.device)).double().cpu().numpy())
    head = model.head.weight.detach().double().cpu().numpy()[0]
    return dict(zip(texts, np.concatenate(rows), strict=True)), head
