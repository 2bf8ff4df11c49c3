"""Many models in little more memory than one: a trunk, and adapters of which one is added to it while it is read.

    layer(x) = W·x + scaling · B·(A·x)        A [r, in], B [out, r]

The trunk's weights never change, so the model that has it as its own stays what it is. An adapter lies in a folder in
peft's format: of a reward model's folder, `PeftModel.from_pretrained(AutoModel.from_pretrained(FOLDER),
FOLDER/members/1)` is the second member's trunk. Reading it here needs no peft, which takes seconds to import.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.errors import ModelError
from rlhf.models.adapters import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FILE_PREFIX,
    Factors,
    check_fits,
    factors_of,
    merge_factors,
)
from rlhf.models.folders import read_json, sha256_file, write_json
from rlhf.models.reward import RewardModel, at_last_token

_FILE_NAMES = (".lora_A.weight", ".lora_B.weight")
_REMEDY = "copy the whole folder of the reward model again, or train it again"


class Adapter(nn.Module):
    """Factors for some layers of a model, frozen."""

    def __init__(self, factors: Factors, alpha: float) -> None:
        """
        Args:
            factors: for one layer or more, all of one rank.
            alpha: the scaling is alpha / r.
        """
        super().__init__()
        self.alpha = alpha
        self._names = tuple(factors)
        self._left = _frozen(left for left, _ in factors.values())
        self._right = _frozen(right for _, right in factors.values())

    @property
    def factors(self) -> Factors:
        return {name: (left, right) for name, left, right in zip(self._names, self._left, self._right, strict=True)}

    @property
    def rank(self) -> int:
        return len(self._right[0])

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's layers compute what they do with the adapter."""
        scaling = self.alpha / self.rank
        with ExitStack() as hooks:
            for name, (left, right) in self.factors.items():
                hook = partial(_with_adapter, left, right, scaling)
                hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
            yield


class AdaptedTrunk(nn.Module):
    """What a reward model's trunk is with an adapter on it."""

    def __init__(self, base: RewardModel, adapter: Adapter) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    @property
    def device(self) -> torch.device:
        return self.base.device

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T, H], as `RewardModel.hidden`."""
        with self.adapter.on(self.base.trunk):
            return self.base.hidden(input_ids, attention_mask)

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, H], as `RewardModel.last_hidden`."""
        return at_last_token(self.hidden(input_ids, attention_mask), attention_mask)

    def save(self, folder: Path) -> None:
        """The adapter alone, in float32; into a folder that is being filled."""
        folder.mkdir(parents=True)
        named = self.adapter.factors.items()
        tensors = {f"{FILE_PREFIX}{name}{_FILE_NAMES[0]}": right for name, (_, right) in named}
        tensors |= {f"{FILE_PREFIX}{name}{_FILE_NAMES[1]}": left for name, (left, _) in named}
        on_cpu = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, folder / ADAPTER_FILE, metadata={"format": "pt"})
        # Written without peft, whose order of the layers is another in every process: equal models have equal hashes.
        config = {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "r": self.adapter.rank,
            "lora_alpha": self.adapter.alpha,
            "target_modules": sorted(self.adapter.factors),
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in self.base.trunk.modules()),
            "inference_mode": True,
        }
        write_json(folder / CONFIG_FILE, config)


def on_one_trunk(base: RewardModel, adapters: list[Factors], alpha: float) -> list[RewardModel | AdaptedTrunk]:
    """The models that adapters make of a base, in its memory: the base itself becomes the first.

        W_m = W + s·B_m·A_m = W_0 + s·(B_m·A_m - B_0·A_0)        W_0 = W + s·B_0·A_0

    So the first is an ordinary model, and the others have adapters of twice the rank on it.

    Args:
        base: changed in place.
        adapters: for the base's trunk as it is, all for the same layers and of one rank r.
        alpha: s is alpha / r.
    """
    first, *others = adapters
    rank = Adapter(first, alpha).rank
    merge_factors(base.trunk, base.trunk, first, alpha / rank)
    return [base, *(AdaptedTrunk(base, Adapter(_less(other, first), 2 * alpha)) for other in others)]


def load_adapter(folder: Path, model: nn.Module) -> Adapter:
    """What `AdaptedTrunk.save` wrote, on the model's device and in its dtype.

    Raises:
        ModelError: missing or damaged, or for another model.
    """
    file = folder / ADAPTER_FILE
    rank, alpha = _rank_and_alpha(folder / CONFIG_FILE)
    try:
        tensors = {name.removeprefix(FILE_PREFIX): tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is missing or damaged; {_REMEDY}") from error
    try:
        factors = factors_of(tensors, _FILE_NAMES)
        check_fits(factors, model)
    except ModelError as error:
        raise ModelError(f"{file}: {error}; {_REMEDY}") from error
    if not factors or any(len(right) != rank for _, right in factors.values()):
        raise ModelError(f"{file}: has another rank than {CONFIG_FILE} says, {rank}, or no layers; {_REMEDY}")
    like = next(model.parameters())
    return Adapter({name: (left.to(like), right.to(like)) for name, (left, right) in factors.items()}, alpha)


def is_adapter(folder: Path) -> bool:
    """Whether an adapter is what the folder holds, or held."""
    return any((folder / name).is_file() for name in (ADAPTER_FILE, CONFIG_FILE))


def adapter_sha256(folder: Path) -> str:
    """Lower-case hex, of the factors and of how much they count.

    Raises:
        ModelError: one of the two files is missing.
    """
    for path in (folder / ADAPTER_FILE, folder / CONFIG_FILE):
        if not path.is_file():
            raise ModelError(f"{path} is missing; {_REMEDY}")
    hashes = [sha256_file(folder / name) for name in (ADAPTER_FILE, CONFIG_FILE)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _with_adapter(
    left: Tensor, right: Tensor, scaling: float, layer: nn.Module, inputs: tuple[Tensor], output: Tensor
) -> Tensor:
    """A forward hook: what it returns takes the output's place."""
    update = nn.functional.linear(nn.functional.linear(inputs[0], right), left)
    return torch.add(output, update, alpha=scaling)


def _less(adapter: Factors, first: Factors) -> Factors:
    """[out, r] and [r, in] each -> [out, 2r] and [2r, in], of the difference of their products."""
    return {
        name: (torch.cat([left, -first[name][0]], 1), torch.cat([right, first[name][1]], 0))
        for name, (left, right) in adapter.items()
    }


def _frozen(tensors: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)


def _rank_and_alpha(path: Path) -> tuple[int, float]:
    try:
        content = read_json(path)
        rank, alpha = content["r"], float(content["lora_alpha"])
    except (ModelError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is missing or damaged; {_REMEDY}") from error
    if not (isinstance(rank, int) and rank > 0 and math.isfinite(alpha) and alpha > 0):
        raise ModelError(f"{path}: r and lora_alpha above 0 expected, {rank} and {alpha} received; {_REMEDY}")
    return rank, alpha
