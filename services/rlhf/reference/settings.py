"""Settings of the reference service."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeFloat, PositiveInt

from rlhf.settings import Compute, Listen


class ReferenceSettings(Compute, Listen):
    model: Path | None = None
    """Folder of the frozen initial model. None: the run's start model (run.model)."""
    max_batch_size: PositiveInt = 256
    """Sequences in one forward pass; a larger call is refused."""
    max_batch_tokens: PositiveInt = 32768
    """Padded tokens in one forward pass; a call with more is split."""
    max_delay_ms: NonNegativeFloat = 2.0
    """Time that a call waits for others to be batched with."""
    max_waiting_items: PositiveInt = 4096
    """Sequences that may wait; more are refused with RESOURCE_EXHAUSTED and a time to try again."""
    blobs: Path | None = None
    """Folder for hidden states larger than `inline_bytes`, shared with the trainer. None: the run's blobs/."""
    inline_bytes: PositiveInt = 262144
    """Hidden states of one sequence up to this size travel in the messages, larger ones as blobs."""
