"""Groups of settings that several sections have in common. Sections inherit them; they are no sections themselves."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.settings.section import Section

Dtype = Literal["float32", "bfloat16", "float16"]
InstanceName = Annotated[str, AfterValidator(lambda name: name or socket.gethostname())]
"""Stable name of one process among its like. Given empty, it is the machine's: in a container that of the container,
which a restart keeps."""


class Compute(Section):
    """Where a model runs."""

    device: str = "cpu"
    """Torch device, such as "cpu", "cuda" or "cuda:1"."""
    dtype: Dtype = "float32"
    """Number format of the forward pass."""
    threads: NonNegativeInt = 0
    """CPU threads for torch in this process; 0 leaves torch's own choice, one per core."""


class Listen(Section):
    """What a gRPC server listens on and whom it lets in."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs `token_file` or `tls_cert`."""
    port: int = Field(default=0, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""
    token_file: Path | None = None
    """File with a token that every call but health must bring as `authorization: Bearer …`."""
    tls_cert: Path | None = None
    """PEM file with the server's certificate chain."""
    tls_key: Path | None = None
    """PEM file with the server's private key."""
    grace_s: PositiveFloat = 10.0
    """Seconds that calls in flight have to finish after SIGTERM."""
    max_message_mib: PositiveInt = Field(default=64, le=512)
    """Largest message in MiB, both ways."""


class Optimisation(Section):
    """AdamW and its schedule, for pretraining, fine-tuning and reward models."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of all optimiser steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 after warm-up (`constant`: it does not)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta2: float = Field(default=0.99, gt=0, lt=1)
    """AdamW's second-moment decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches per optimiser step; losses are weighted by tokens, so the result is one large batch's."""
    checkpoint_every: PositiveInt = 200
    """Optimiser steps between checkpoints; an interrupted command continues from the newest."""
