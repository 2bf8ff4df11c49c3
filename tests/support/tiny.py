"""Tiny random models in ordinary folders: what every test uses where a person has a real model."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf.models.causal import new_causal_lm, save_model
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import train_tokenizer
from rlhf.sft.settings import PretrainSettings

TEXTS = ("A fine film with a slow start.", "The plot was dull, the music good.", "I liked it!", "Avoid this one.")


@functools.cache
def tiny_tokenizer(vocab_size: int = 280) -> PreTrainedTokenizerFast:
    """Byte-level BPE with its own end and pad token; treat it as read-only."""
    return train_tokenizer(TEXTS * 3, vocab_size)


def tiny_lm(architecture: str = "llama", seed: int = 0, context: int = 64) -> PreTrainedModel:
    """Hidden 16, two layers, in eval mode. Its logits are spread wider than a fresh model's, so samples differ."""
    settings = PretrainSettings(
        architecture=architecture, hidden_size=16, layers=2, heads=2, context=context, sequence_length=16, seed=seed
    )
    model = new_causal_lm(settings, tiny_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return model.eval()


def tiny_lm_folder(folder: Path, architecture: str = "llama", seed: int = 0, context: int = 64) -> Path:
    """A `from_pretrained` folder of `tiny_lm` with its tokenizer."""
    save_model(tiny_lm(architecture, seed, context), tiny_tokenizer(), folder)
    return folder


def tiny_reward_folder(folder: Path, seed: int = 0, mean: float = 0.25, std: float = 0.5) -> Path:
    """A reward model's folder over the trunk of `tiny_lm`."""
    start = tiny_lm_folder(folder.with_name(f"{folder.name}-start"), seed=seed)
    model = RewardModel.new(start, seed=seed)
    model.mean, model.std = mean, std
    model.save(folder, tiny_tokenizer())
    return folder
