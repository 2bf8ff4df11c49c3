"""A low-rank adapter (LoRA, arXiv:2106.09685) on a causal language model: only the adapter learns.

    layer(x) = W·x + scaling · B·(A·x)        A [r, in], B [out, r]; W is the base's and never changes

`add_adapter` puts peft's layers into a model. From then on `rlhf.models.weights` takes the adapter for the model's
weights: it alone is published, checkpointed and restored. Whoever runs the policy has the base already, and merges:
W + scaling · B·A. Merging needs no peft, which takes seconds to import.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import ModelError, SettingsError, first_line
from rlhf.models.weights import AdapterOf, adapter_of, copy_weights, mark_adapter, named_weights

if TYPE_CHECKING:
    from rlhf.ppo.settings import LoraSettings

NAME = "default"
"""peft's for a model's only adapter; part of its tensors' names."""
FACTORS = (f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight")


def add_adapter(model: PreTrainedModel, settings: LoraSettings, base_sha256: str, seed: int) -> None:
    """In place: the base is frozen, and the adapter, whose B is 0, changes nothing yet.

    Args:
        base_sha256: of the base's weights.
        seed: of A.

    Raises:
        SettingsError: `target_modules` names nothing, or more than linear layers inside the model.
    """
    from peft import inject_adapter_in_model

    config = _config(model, settings)
    try:
        # On the CPU, so that A does not depend on the device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise SettingsError(f"lora.target_modules: {first_line(error)}") from error
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    layers = dict(_adapted(model))
    for name, layer in layers.items():
        if layer is output or not isinstance(layer.base_layer, (nn.Linear, Conv1D)):
            raise SettingsError(
                f"lora.target_modules: {name} is no linear layer inside the model; only those can have an adapter here"
            )
    model.eval()  # type: ignore[no-untyped-call]
    scaling = next(iter(layers.values())).scaling[NAME]
    mark_adapter(model, AdapterOf(base_sha256, float(scaling)))


def dropping_out(model: nn.Module, on: bool) -> None:
    """Whether what the adapter reads is dropped at random, as its settings say."""
    for _, layer in _adapted(model):
        layer.lora_dropout.train(on)


@torch.no_grad()
def merge_into(model: nn.Module, base: nn.Module, adapter: Mapping[str, Tensor], scaling: float) -> None:
    """Gives an ordinary model weights that compute what base and adapter do.

    Args:
        model: of the base's shape, or the base itself.
        adapter: as `named_weights` gives them of a model with an adapter; on the base's device, in its dtype.

    Raises:
        ModelError: the adapter is for a model of another shape; nothing was changed.
    """
    weights, factors = named_weights(base), _factors(adapter)
    modules = dict(base.named_modules())
    for name, (left, right) in factors.items():
        # GPT-2's layers keep theirs the other way round.
        if isinstance(modules.get(name), Conv1D):
            left, right = factors[name] = right.T, left.T
        weight = weights.get(f"{name}.weight")
        fits = weight is not None and weight.shape == (len(left), right.shape[1]) and left.shape[1] == len(right)
        if not fits:
            raise ModelError(f"the adapter does not fit the model: {name} is missing there, or has another shape")
    copy_weights(model, weights)
    receiving = named_weights(model)
    for name, (left, right) in factors.items():
        # One at a time: all together would take the model's memory once more, which costs more time than the sums.
        merged_weight = torch.addmm(weights[f"{name}.weight"], left, right, alpha=scaling)
        receiving[f"{name}.weight"].copy_(merged_weight)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model that computes what the one with the adapter does; that one stays as it is."""
    adapter = adapter_of(model)
    assert adapter is not None
    plain = copy.deepcopy(model)
    for name, layer in list(_adapted(plain)):
        plain.set_submodule(name, layer.base_layer)
    mark_adapter(plain, None)
    del plain.peft_config
    merge_into(plain, plain, named_weights(model), adapter.scaling)
    return plain


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """In peft's own format: `PeftModel.from_pretrained(base, folder)` reads it."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.cpu().contiguous()
        for name, tensor in named_weights(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = model.peft_config
    config[NAME].save_pretrained(folder)


def _config(model: PreTrainedModel, settings: LoraSettings) -> Any:
    from peft import LoraConfig

    targets = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft put there, by name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _factors(adapter: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A, in the order of their product, by their layer's name.

    Raises:
        ModelError: these are not the tensors of an adapter.
    """
    names = [name.removesuffix(FACTORS[0]) for name in adapter if name.endswith(FACTORS[0])]
    if {f"{name}{factor}" for name in names for factor in FACTORS} != adapter.keys():
        raise ModelError("the tensors are not those of an adapter: each layer needs its A and its B, and nothing else")
    return {name: (adapter[f"{name}{FACTORS[1]}"], adapter[f"{name}{FACTORS[0]}"]) for name in names}
