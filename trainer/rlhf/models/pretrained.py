"""One careful way to `from_pretrained`: safetensors only, no network, no foreign code, a sentence for every fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf.errors import ModelError, first_line
from rlhf.models.compute import torch_device, torch_dtype
from rlhf.models.folders import recover_folder
from rlhf.models.tokenizer import load_tokenizer, refuse_code

# Services write one log line per event; transformers' bars and its table of unused keys are not among them.
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def load_pretrained(auto_class: Any, architecture: str, folder: Path, device: str, dtype: str) -> PreTrainedModel:
    """
    Args:
        auto_class: AutoModelForCausalLM or a sibling.
        architecture: what the folder must hold, in words, for the error.

    Returns:
        The model in eval mode on the device.

    Raises:
        ModelError: folder, config, weights or tokenizer are missing, damaged, of another architecture, or do not fit
            each other.
        SettingsError: the machine has no such device.
    """
    config = _load_config(folder)
    _check_architecture(auto_class, architecture, config, folder)
    with model_errors(folder):
        model, info = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=torch_dtype(dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"{folder}: weights are missing ({missing}); the folder does not hold a {architecture}")
    _check_vocabulary(model, folder)
    return model.to(torch_device(device)).eval()  # type: ignore[no-any-return]


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or its shards in order.

    Raises:
        ModelError: there are none.
    """
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: has no model.safetensors; only safetensors are read (other formats can run code)")
    return files


@contextmanager
def model_errors(folder: Path) -> Iterator[None]:
    """Turns what transformers and safetensors raise on a damaged folder into ModelError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{folder}: the model cannot be loaded; a file may be cut short or damaged: {first_line(error)}"
        ) from error


def _load_config(folder: Path) -> PreTrainedConfig:
    recover_folder(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json, so it is no model folder")
    weight_files(folder)
    refuse_code(folder)
    with model_errors(folder):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config


def _check_architecture(auto_class: Any, architecture: str, config: PreTrainedConfig, folder: Path) -> None:
    """Loading alone does not tell: a masked language model's weights fit a causal one of the same family."""
    known = auto_class._model_mapping
    expected = known[type(config)].__name__ if type(config) in known else ""
    held = config.architectures or [expected]
    if not expected or expected not in held:
        raise ModelError(
            f"{folder}: holds a {', '.join(held) or config.model_type}, but a {architecture}"
            f"{f' ({expected})' if expected else ''} is needed"
        )


def _check_vocabulary(model: PreTrainedModel, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    if rows < len(tokenizer):
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries but the model embeds only {rows}; "
            "they belong to different models"
        )
