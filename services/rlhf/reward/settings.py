"""Settings of the reward service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from rlhf.settings import Compute, Listen


class RewardSettings(Compute, Listen):
    model: Path | None = None
    """Folder of a reward model. None, and no rule: the run's reward-model/."""
    follow: Path | None = None
    """JSON file {"folder", "sha256"} of the model to serve, as rounds of feedback write it. It is looked at again and
    again, and the service changes over between two calls. While there is no such file: `model`."""
    follow_poll_s: PositiveFloat = 1.0
    """Seconds between two looks."""
    rule: str = ""
    """A Python rule instead of a model, as `module:function`; see `rlhf.reward.rules` for its signature."""
    aggregation: Literal["mean", "worst", "mean-variance", "entropic"] = "mean"
    """The score from the members of an ensemble: their mean, the least, mean - variance_lambda * variance, or
    -entropic_beta log mean exp(-r / entropic_beta), which is the mean for a large beta and the least for a small one.
    Each is scaled to mean 0 and standard deviation 1 on the model's reference set."""
    variance_lambda: NonNegativeFloat = 1.0
    """With `aggregation = "mean-variance"`: members' scores have standard deviation 1."""
    entropic_beta: PositiveFloat = 1.0
    """With `aggregation = "entropic"`: in standard deviations of a member's scores."""
    max_batch_size: PositiveInt = 256
    """Items in one forward pass; a larger call is refused."""
    max_batch_tokens: PositiveInt = 32768
    """Padded tokens in one forward pass; a call with more is split."""
    max_delay_ms: NonNegativeFloat = 2.0
    """Time that a call waits for others to be batched with."""
    max_waiting_items: PositiveInt = 4096
    """Items that may wait; more are refused with RESOURCE_EXHAUSTED and a time to try again."""
