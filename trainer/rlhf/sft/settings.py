"""Settings of step 1."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rlhf.settings import Compute, Optimisation


class PretrainSettings(Compute, Optimisation):
    texts: str = ""
    """JSONL, Parquet or name of a Hugging Face dataset with texts. Empty: the run's data/texts.jsonl."""
    heldout_texts: str = ""
    """The same for perplexity. Empty: the run's data/heldout_texts.jsonl if `texts` is empty too, else 5 % of
    the rows."""
    text_field: str = "text"
    """The field of a row that holds its text."""
    out: Path | None = None
    """Folder to write. None: the run's pretrained/."""
    init_from: Path | None = None
    """Folder of a model to continue training; None: a new one of the shape below."""
    architecture: Literal["llama", "gpt2"] = "llama"
    """Shape of a new model."""
    vocab_size: PositiveInt = 1024
    """Entries of a new byte-level BPE tokenizer."""
    hidden_size: PositiveInt = 128
    """Width of a new model."""
    layers: PositiveInt = 4
    """Blocks of a new model."""
    heads: PositiveInt = 4
    """Attention heads of a new model."""
    context: PositiveInt = 256
    """Positions of a new model."""
    sequence_length: PositiveInt = 128
    """Tokens per training sequence; documents are packed end to end, each ended by the end token."""
    lr: float = Field(default=5e-3, gt=0)
    """Peak learning rate; for a model of a million parameters. Larger ones take less, 3e-4 near a hundred million."""
    batch_size: PositiveInt = 16
    """Sequences per micro-batch."""
    steps: PositiveInt = 300
    """Optimiser steps."""
    seed: NonNegativeInt = 0
    """Seed of initialisation and of the order of the texts."""


class SftSettings(Compute, Optimisation):
    data: str = ""
    """JSONL, Parquet or dataset name with rows {"prompt", "completion"} or {"messages"}; required."""
    model: Path | None = None
    """Folder of the model to fine-tune. None: the run's pretrained/."""
    out: Path | None = None
    """Folder to write. None: the run's sft/."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    batch_size: PositiveInt = 16
    """Examples per micro-batch."""
    epochs: PositiveInt = 1
    """Passes over the data."""
    max_length: PositiveInt = 512
    """Longer examples are refused with their line, or cut, by `overlong`."""
    overlong: Literal["refuse", "truncate"] = "refuse"
    """What happens to an example longer than `max_length`."""
    heldout_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows kept for the held-out loss."""
    seed: NonNegativeInt = 0
    """Seed of the split and of the order of the rows."""
