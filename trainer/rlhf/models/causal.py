"""Causal language models: loading, saving, and new small ones."""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import ModelError, SettingsError
from rlhf.models.adapters import merged, save_adapter
from rlhf.models.folders import replacing_folder, sha256_file
from rlhf.models.pretrained import load_pretrained, weight_files
from rlhf.models.weights import adapter_of

if TYPE_CHECKING:
    from rlhf.sft.settings import PretrainSettings


def load_causal_lm(folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """In eval mode.

    Raises:
        ModelError: missing, truncated, of another architecture, without tokenizer, or with fewer embeddings than the
            tokenizer has entries.
        SettingsError: the machine has no such device.
    """
    return load_pretrained(AutoModelForCausalLM, "causal language model", Path(folder), device, dtype)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """An ordinary `from_pretrained` folder, complete or not at all. Of a model with an adapter the two merged, and
    beside them, in `adapter`, the adapter in peft's format.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old folder stays.
    """
    with replacing_folder(Path(folder)) as temporary:
        if adapter_of(model) is None:
            model.save_pretrained(temporary)
        else:
            merged(model).save_pretrained(temporary)
            save_adapter(model, temporary / "adapter")
        tokenizer.save_pretrained(temporary)


def weights_sha256(folder: str | Path) -> str:
    """Lower-case hex of model.safetensors; of several shards, of their hashes in order.

    Raises:
        ModelError: there are none.
    """
    hashes = [sha256_file(file) for file in weight_files(Path(folder))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def new_causal_lm(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Random weights from `settings.seed`; input and output embeddings are one matrix, half the size of a small model.

    Raises:
        SettingsError: the width is no multiple of the heads (for llama an even one), or a training sequence is longer
            than the context.
    """
    _check_shape(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _llama(settings, tokenizer) if settings.architecture == "llama" else _gpt2(settings, tokenizer)


def disable_dropout(model: nn.Module) -> None:
    """For training without it: log-probs before and after a step must differ by the step alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention layers pass a number to a functional form; its name differs from model to model.
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def attend_with(model: nn.Module, implementation: str | None) -> None:
    """Gives every transformers model inside one of its implementations of attention; None: leaves them as they are.

    Raises:
        ModelError: the architecture does not have it.
    """
    for module in model.modules():
        if implementation is not None and isinstance(module, PreTrainedModel):
            try:
                module.set_attn_implementation(implementation)
            except ValueError as error:
                name = type(module).__name__
                raise ModelError(f"{name}: has no attention {implementation!r} (ppo.attention)") from error


def checkpoint_activations(model: nn.Module) -> None:
    """Every layer's activations are computed again in the backward pass, not kept.

    Layers do so in training mode alone. Only they themselves are put into it: what is inside them, dropout for one,
    stays as it is.

    Raises:
        ModelError: the architecture does not support it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__}: its layers cannot be checkpointed (ppo.gradient_checkpointing)")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        layer.training = True


def _check_shape(settings: PretrainSettings) -> None:
    width = settings.hidden_size / settings.heads
    if settings.hidden_size % settings.heads or (settings.architecture == "llama" and width % 2):
        raise SettingsError(
            f"pretrain.hidden_size: {settings.hidden_size} cannot be divided among {settings.heads} heads"
            " (llama needs an even width for each)"
        )
    if settings.sequence_length > settings.context:
        raise SettingsError(
            f"pretrain.sequence_length: {settings.sequence_length} is longer than pretrain.context, {settings.context}"
        )


def _initial_std(hidden_size: int) -> float:
    """Nguyen and Salazar 2019, arXiv:1910.05895, section 2.2. The usual 0.02 is made for widths near 1000; at 128 it
    costs a quarter of the demo's training before anything is learned."""
    return math.sqrt(2 / (5 * hidden_size))


def _llama(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            # A gated block has three matrices: 8/3 of the width has the parameters of the plain block's 4.
            intermediate_size=max(32, round(settings.hidden_size * 8 / 3 / 32) * 32),
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            initializer_range=_initial_std(settings.hidden_size),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _gpt2(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=settings.hidden_size,
            n_layer=settings.layers,
            n_head=settings.heads,
            n_positions=settings.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=_initial_std(settings.hidden_size),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
