"""What the log-prob functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogprobOutput(NamedTuple):
    """Per token, of the labels' shape, float32 (float64 from float64 logits); 0 where the label is ignored.

    p is the policy's softmax(logits / temperature), r the reference's. What was not asked for is None. Gradients flow
    to the policy alone: the reference is frozen.
    """

    logprobs: Tensor
    """log p(label)."""
    ref_logprobs: Tensor | None = None
    """log r(label)."""
    kl: Tensor | None = None
    """KL(p ‖ r) = Σ p log(p / r) over the whole vocabulary, in nats: exact, where estimators see the label alone."""
    entropy: Tensor | None = None
    """-Σ p log p, in nats."""
    logsumexp: Tensor | None = None
    """log Σ exp(logits / temperature)."""
    ref_logsumexp: Tensor | None = None
