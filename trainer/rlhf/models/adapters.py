"""A low-rank adapter (LoRA, arXiv:2106.09685) on a language model or a reward model's trunk: only the adapter learns.

    layer(x) = W·x + scaling · B·(A·x)        A [r, in], B [out, r]; W is the base's and never changes

`add_adapter` puts peft's layers into a model. From then on `rlhf.models.weights` takes the adapter for the model's
weights: it alone is published, checkpointed and restored. Whoever runs the policy has the base already, and merges:
W + scaling · B·A. Merging needs no peft, which takes seconds to import.

A reward model's trunk is given one adapter after the other (`inject_adapter`, `take_adapter`), see
`rlhf.models.adapted`.
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
Factors = dict[str, tuple[Tensor, Tensor]]
"""B [out, r] and A [r, in], in the order of their product, by their layer's name."""
ADAPTER_FILE = "adapter_model.safetensors"
"""As peft calls it; so are the next two."""
CONFIG_FILE = "adapter_config.json"
FILE_PREFIX = "base_model.model."


def add_adapter(model: PreTrainedModel, settings: LoraSettings, base_sha256: str, seed: int) -> None:
    """In place: the base is frozen, and the adapter, whose B is 0, changes nothing yet.

    Args:
        base_sha256: of the base's weights.
        seed: of A.

    Raises:
        SettingsError: as `inject_adapter`.
    """
    scaling = inject_adapter(model, settings, seed, "lora.target_modules")
    mark_adapter(model, AdapterOf(base_sha256, scaling))


def inject_adapter(model: PreTrainedModel, settings: LoraSettings, seed: int, setting: str) -> float:
    """`add_adapter`, but the model's weights are not taken to be the adapter's alone. Returns the scaling.

    Args:
        setting: the name of `target_modules`, for errors.

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
        raise SettingsError(f"{setting}: {first_line(error)}") from error
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    layers = dict(_adapted(model))
    for name, layer in layers.items():
        if layer is output or not isinstance(layer.base_layer, (nn.Linear, Conv1D)):
            raise SettingsError(
                f"{setting}: {name} is no linear layer inside the model; only those can have an adapter here"
            )
    model.eval()  # type: ignore[no-untyped-call]
    return float(next(iter(layers.values())).scaling[NAME])


def take_adapter(model: PreTrainedModel) -> Factors:
    """Takes the adapter off again: the model is what it was without, and still frozen."""
    factors = {}
    for name, layer in list(_adapted(model)):
        factors[name] = (layer.lora_B[NAME].weight.detach(), layer.lora_A[NAME].weight.detach())
        model.set_submodule(name, layer.base_layer)
    del model.peft_config
    mark_adapter(model, None)
    return factors


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
    merge_factors(model, base, factors_of(adapter), scaling)


@torch.no_grad()
def merge_factors(model: nn.Module, base: nn.Module, factors: Factors, scaling: float) -> None:
    """`merge_into` with the adapter's tensors by layer.

    Raises:
        ModelError: as there.
    """
    check_fits(factors, base)
    weights, modules = named_weights(base), dict(base.named_modules())
    copy_weights(model, weights)
    receiving = named_weights(model)
    for name, (left, right) in factors.items():
        # GPT-2's layers keep theirs the other way round.
        pair = (right.T, left.T) if isinstance(modules[name], Conv1D) else (left, right)
        # One at a time: all together would take the model's memory once more, which costs more time than the sums.
        merged_weight = torch.addmm(weights[f"{name}.weight"], *pair, alpha=scaling)
        receiving[f"{name}.weight"].copy_(merged_weight)


def check_fits(factors: Factors, model: nn.Module) -> None:
    """
    Raises:
        ModelError: the model lacks one of the layers, or its shape is another.
    """
    weights, modules = named_weights(model), dict(model.named_modules())
    for name, (left, right) in factors.items():
        layer, weight = modules.get(name), weights.get(f"{name}.weight")
        if weight is None or not isinstance(layer, (nn.Linear, Conv1D)):
            raise ModelError(f"the adapter does not fit the model: it has no linear layer {name}")
        shape = weight.T.shape if isinstance(layer, Conv1D) else weight.shape
        matrices = left.ndim == right.ndim == 2
        if not matrices or left.shape[1] != len(right) or shape != (len(left), right.shape[1]):
            raise ModelError(f"the adapter does not fit the model: {name} has another shape there")


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model that computes what the one with the adapter does; that one stays as it is."""
    adapter = adapter_of(model)
    assert adapter is not None
    plain = copy.deepcopy(model)
    merge_factors(plain, plain, take_adapter(plain), adapter.scaling)
    return plain


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """In peft's own format: `PeftModel.from_pretrained(base, folder)` reads it."""
    folder.mkdir()
    tensors = {
        f"{FILE_PREFIX}{name.replace(f'.{NAME}.', '.')}": tensor.cpu().contiguous()
        for name, tensor in named_weights(model).items()
    }
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config: Any = model.peft_config
    config[NAME].save_pretrained(folder)


def factors_of(adapter: Mapping[str, Tensor], names: tuple[str, str] = FACTORS) -> Factors:
    """
    Args:
        names: ends of the names of an A and a B.

    Raises:
        ModelError: these are not the tensors of an adapter.
    """
    layers = [name.removesuffix(names[0]) for name in adapter if name.endswith(names[0])]
    if {f"{layer}{name}" for layer in layers for name in names} != adapter.keys():
        raise ModelError("the tensors are not those of an adapter: each layer needs its A and its B, and nothing else")
    return {layer: (adapter[f"{layer}{names[1]}"], adapter[f"{layer}{names[0]}"]) for layer in layers}


def _config(model: PreTrainedModel, settings: LoraSettings) -> Any:
    from peft import LoraConfig

    targets = settings.target_modules
    causal = model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        base_model_name_or_path=model.name_or_path,
    )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft put there, by name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
