"""Tiny random models in ordinary folders: what every test uses where a person has a real model."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf.models.adapted import on_one_trunk
from rlhf.models.adapters import Factors, inject_adapter, take_adapter
from rlhf.models.causal import new_causal_lm, save_model
from rlhf.models.ensemble import Heads, about, member_folders, raw_values, save_heads
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import train_tokenizer
from rlhf.ppo.settings import LoraSettings
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


def tiny_adapters(base: RewardModel, count: int, rank: int = 2) -> list[Factors]:
    """For the base's trunk, which they leave as it is; as if trained: no B is 0. They count twice."""
    settings, found = LoraSettings(rank=rank, alpha=2 * rank, target_modules="all-linear"), []
    for seed in range(count):
        inject_adapter(base.trunk, settings, seed, "lora")
        generator = torch.Generator().manual_seed(seed)
        drawn = take_adapter(base.trunk).items()
        found.append(
            {name: (torch.randn(left.shape, generator=generator) / 10, right) for name, (left, right) in drawn}
        )
    return found


def tiny_adapted_folder(folder: Path, architecture: str = "llama", members: int = 3) -> Path:
    """A reward model's folder whose members are `tiny_adapters` on `tiny_lm`, which lies beside it as NAME-start."""
    base = RewardModel.new(tiny_lm_folder(folder.with_name(f"{folder.name}-start"), architecture), seed=1)
    trunks = on_one_trunk(base, tiny_adapters(base, members), alpha=4)
    weight = torch.randn(members, 1, 16, generator=torch.Generator().manual_seed(0))
    heads = Heads(weight, torch.zeros(1), torch.ones(1), torch.ones(1))
    with torch.no_grad():
        batch = pad([[5, 6, 7, 0], [9, 10, 0], [30, 31, 32, 33, 34, 0], [8, 0]], 1)
        heads = heads.normalised(raw_values([trunk.last_hidden(*batch) for trunk in trunks], weight))
        base.head.weight.copy_(weight[0])
    base.mean, base.std = float(heads.mean[0, 0]), float(heads.std[0, 0])
    base.facts["ensemble"] = about(heads, "lora")

    def beside(temporary: Path) -> None:
        save_heads(temporary, heads)
        for place, trunk in zip(member_folders(temporary, members), trunks[1:], strict=True):
            trunk.save(place)  # type: ignore[call-arg]

    base.save(folder, tiny_tokenizer(), (), beside)
    return folder
