"""Tokenizers: loading, training, and a hash by which two services find out that they mean the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import ModelError, SettingsError, first_line
from rlhf.models.folders import read_json, recover_folder

END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        ModelError: the folder or its tokenizer is missing or cannot be read.
    """
    folder = Path(folder)
    recover_folder(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not any((folder / name).is_file() for name in _FILES):
        raise ModelError(f"{folder}: has no tokenizer (one of {', '.join(_FILES)}); save it beside the model")
    refuse_code(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise plain Exception
        raise ModelError(f"{folder}: its tokenizer cannot be read: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"{folder}: has a {type(tokenizer).__name__} where a tokenizer is expected")
    return tokenizer


def refuse_code(folder: Path) -> None:
    """
    Raises:
        ModelError: the folder brings Python code for its model or tokenizer, which is never run.
    """
    for name in ("config.json", "tokenizer_config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if isinstance(content, dict) and "auto_map" in content:
            raise ModelError(
                f"{folder}: {name} names code of the folder's own (auto_map), which is never run; use a model that "
                "transformers knows by itself, or, if it knows this one, remove auto_map"
            )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so every text has tokens and comes back unchanged, with an end and a pad token of its own.

    Raises:
        SettingsError: `vocab_size` has no room for the 256 bytes and the two special tokens.
    """
    if vocab_size < 258:
        raise SettingsError(f"vocab_size: at least 258 expected (256 bytes, end, pad), {vocab_size} received")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges and special ids; the same after saving and loading and in any library version."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    content = {"vocabulary": tokenizer.get_vocab(), "merges": merges, "special": special}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill batches with. Any would do: masks, not ids, say what counts."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token_id) for token_id in candidates if token_id is not None)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation config (some chat models have
    several)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token_id) for token_id in (*several, tokenizer.eos_token_id) if token_id is not None)
