"""Reward models that score together: members, and within each member a reward for every group of like taste.

The folder of an ensemble is an ordinary reward model's folder, which plain transformers and everything here that wants
a single model read as one, with more beside it:

    reward_model.json       "ensemble": {"members", "trunk", "groups", "combine", "quantile"}
    ensemble.safetensors    heads [M, G, H], normalisations, shares [G], the members' scores on the reference set [N, M]
    members/1, members/2 …  the other members: with separate trunks each a reward model's folder, with trunk "lora" each
                            an adapter on the first member's trunk, in peft's format (`rlhf.models.adapted`)

The single model is the mean of all members' groups where they share a trunk, and the first member's where they do not.

A member's score: each group's raw score is normalised on the reference set, the groups are combined, and the result is
normalised again. So members and groups compare like with like, whatever scale each head has found for itself.

Shapes: `B` sequences, `T` tokens, `H` hidden, `M` members, `G` groups, `N` sequences of the reference set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.errors import ModelError
from rlhf.models.adapted import AdaptedTrunk, adapter_sha256, is_adapter, load_adapter
from rlhf.models.causal import weights_sha256
from rlhf.models.folders import sha256_file
from rlhf.models.reward import RewardModel, normalisation_of

ENSEMBLE_FILE = "ensemble.safetensors"
MEMBERS_FOLDER = "members"
Trunk = RewardModel | AdaptedTrunk
"""What gives hidden states."""


@dataclass(frozen=True)
class Heads:
    """What an ensemble has besides its trunks."""

    weight: Tensor
    """[M, G, H] float32"""
    mean: Tensor
    """[M, G] float32, of the raw scores on the reference set."""
    std: Tensor
    """[M, G] float32"""
    shares: Tensor
    """[G] float32: of the people in each group; they add up to 1."""
    combine: str = "mean"
    """Of groups: `mean`, `least` or `quantile`."""
    quantile: float = 0.0
    member_mean: Tensor | None = None
    """[M] float32, of the combined scores on the reference set; None: not measured, taken as 0 and 1."""
    member_std: Tensor | None = None
    """[M] float32"""
    reference_scores: Tensor | None = None
    """[N, M] float32: the members' scores on the reference set, from which any aggregate's scale follows."""

    @property
    def members(self) -> int:
        return len(self.weight)

    @property
    def groups(self) -> int:
        return self.weight.shape[1]

    def member_scores(self, raw: Tensor) -> Tensor:
        """[..., M, G] raw -> [..., M]."""
        combined = combine_groups((raw - self.mean) / self.std, self.shares, self.combine, self.quantile)
        if self.member_mean is None or self.member_std is None:
            return combined
        return (combined - self.member_mean) / self.member_std

    def normalised(self, raw: Tensor) -> Heads:
        """With the normalisation of the raw scores [N, M, G] of the reference set.

        Raises:
            ModelError: a head hardly tells them apart.
        """
        mean, std = normalisation_of(raw)
        own = Heads(self.weight, mean.float(), std.float(), self.shares, self.combine, self.quantile)
        if own.groups > 1:
            member_mean, member_std = normalisation_of(own.member_scores(raw))
            own = Heads(**{**vars(own), "member_mean": member_mean.float(), "member_std": member_std.float()})
        return Heads(**{**vars(own), "reference_scores": own.member_scores(raw).float()})

    def to(self, device: torch.device) -> Heads:
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return Heads(**moved)


def combine_groups(values: Tensor, shares: Tensor, combine: str, quantile: float) -> Tensor:
    """[..., G] -> [...].

    `quantile`: the least value such that groups with that share of the people or more have it or less.
    """
    if values.shape[-1] == 1:
        return values.squeeze(-1)
    if combine == "mean":
        return (values * shares).sum(-1)
    if combine == "least":
        return values.amin(-1)
    ordered, order = values.sort(-1)
    # Shares that add up to the quantile only within rounding still reach it.
    reached = shares[order].cumsum(-1) >= quantile - 1e-6
    return ordered.gather(-1, reached.int().argmax(-1, keepdim=True)).squeeze(-1)


class RewardEnsemble(nn.Module):
    """The members of a reward model's folder; of an ordinary one, its single member."""

    def __init__(self, trunks: Sequence[Trunk], heads: Heads) -> None:
        """
        Args:
            trunks: one that all members share, or one for each, of which the first is a reward model.
        """
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        self.heads = heads.to(self.first.device)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> RewardEnsemble:
        """
        Raises:
            ModelError: as `RewardModel.load`; or a part of the ensemble is missing or does not fit the others.
        """
        folder = Path(folder)
        first = RewardModel.load(folder, device=device, dtype=dtype)
        stated = first.facts.get("ensemble")
        if stated is None:
            return cls([first], single_head(first))
        heads = _load_heads(folder, stated)
        if heads.weight.shape[-1] != first.head.in_features:
            raise ModelError(f"{folder / ENSEMBLE_FILE}: its heads are for another model than the one beside it")
        others = member_folders(folder, heads.members)
        if stated.get("trunk") == "separate":
            return cls([first, *(RewardModel.load(other, device=device, dtype=dtype) for other in others)], heads)
        if stated.get("trunk") == "lora":
            return cls([first, *(AdaptedTrunk(first, load_adapter(other, first.trunk)) for other in others)], heads)
        return cls([first], heads)

    @property
    def first(self) -> RewardModel:
        """The model that the folder is to whoever reads a single one."""
        return self.trunks[0]  # type: ignore[return-value]

    @property
    def members(self) -> int:
        return self.heads.members

    @property
    def reference_scores(self) -> Tensor | None:
        """[N, M] float32; None of a single member, whose scale is its own."""
        return self.heads.reference_scores if self.members > 1 else None

    def token_values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T, M] float32: every member's normalised value at every token; meaningless where the mask is False."""
        hidden = [trunk.hidden(input_ids, attention_mask) for trunk in self.trunks]  # type: ignore[operator]
        return self.heads.member_scores(raw_values(hidden, self.heads.weight))


def raw_values(hidden: list[Tensor], weight: Tensor) -> Tensor:
    """[..., M, G] float32 from the trunks' hidden states [..., H], one trunk or one for each member."""
    if len(hidden) == 1:
        with torch.autocast(hidden[0].device.type, enabled=False):
            values = nn.functional.linear(hidden[0].float(), weight.flatten(0, 1))
        return values.view(*values.shape[:-1], *weight.shape[:2])
    return torch.cat([raw_values([own], weight[m : m + 1]) for m, own in enumerate(hidden)], -2)


def single_head(model: RewardModel) -> Heads:
    """Of an ordinary reward model."""
    return Heads(
        weight=model.head.weight.detach().float()[None],
        mean=torch.tensor([[model.mean]]),
        std=torch.tensor([[model.std]]),
        shares=torch.ones(1),
    )


def save_heads(folder: Path, heads: Heads) -> None:
    """Into a folder that is being filled."""
    tensors = {name: value.contiguous().cpu() for name, value in vars(heads).items() if isinstance(value, Tensor)}
    save_file(tensors, folder / ENSEMBLE_FILE)


def about(heads: Heads, trunk: str) -> dict[str, Any]:
    """For reward_model.json."""
    return {
        "members": heads.members,
        "trunk": trunk,
        "groups": heads.groups,
        "combine": heads.combine,
        "quantile": heads.quantile,
    }


def member_folders(folder: Path, members: int) -> list[Path]:
    """Of all but the first."""
    return [folder / MEMBERS_FOLDER / str(number) for number in range(1, members)]


def reward_sha256(folder: str | Path) -> str:
    """Lower-case hex, of everything that decides a score: an ordinary model's is that of its weights.

    Raises:
        ModelError: there are no weights.
    """
    folder = Path(folder)
    own = weights_sha256(folder)
    if not (folder / ENSEMBLE_FILE).is_file():
        return own
    others = sorted((folder / MEMBERS_FOLDER).glob("*"), key=lambda path: int(path.name))
    hashes = [own, sha256_file(folder / ENSEMBLE_FILE)]
    hashes += [adapter_sha256(other) if is_adapter(other) else weights_sha256(other) for other in others]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _load_heads(folder: Path, stated: Mapping[str, Any]) -> Heads:
    path = folder / ENSEMBLE_FILE
    try:
        heads = Heads(combine=str(stated["combine"]), quantile=float(stated["quantile"]), **load_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is missing or damaged, but reward_model.json names an ensemble") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: does not hold what an ensemble has, or reward_model.json does not say it") from error
    if heads.weight.ndim != 3 or (heads.members, heads.groups) != (stated.get("members"), stated.get("groups")):
        raise ModelError(f"{path}: holds heads {list(heads.weight.shape)}, another number than reward_model.json says")
    return heads
