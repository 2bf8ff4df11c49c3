"""A causal language model in two parts: its trunk, which gives hidden states, and its output layer, which is linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import ModelError


@dataclass(frozen=True)
class OutputLayer:
    """logits = hidden_states · weightᵀ + bias."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""


def output_layer(model: PreTrainedModel) -> OutputLayer:
    """The model's own parameters, not copies.

    Raises:
        ModelError: the model does more to its hidden states than multiply them (it caps or scales its logits), so that
            log-probs cannot be computed from hidden states.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(f"{_name(model)}: the model has no output layer")
    layer = OutputLayer(head.weight, getattr(head, "bias", None))
    _check(model, layer)
    return layer


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """[B, T, H]: what the output layer reads; the arguments are those of the model's own call."""
    return model.base_model(**inputs).last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def _check(model: PreTrainedModel, layer: OutputLayer) -> None:
    """By trying it: what a model does after its output layer has a different name in every architecture."""
    ids = torch.arange(min(4, len(layer.weight)), device=layer.weight.device).unsqueeze(0)
    expected = model(input_ids=ids, use_cache=False).logits
    found = torch.nn.functional.linear(hidden_states(model, input_ids=ids, use_cache=False), layer.weight, layer.bias)
    scale = expected.float().abs().max().clamp_min(1e-6)
    if not ((found - expected).float().abs().max() / scale).item() < 0.02:
        raise ModelError(
            f"{_name(model)}: its logits are not its last hidden states times its output layer (it caps or scales "
            "them), and such models are not supported here"
        )


def _name(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)
