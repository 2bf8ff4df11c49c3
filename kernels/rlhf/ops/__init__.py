"""Log-probs, KL estimates, entropy and GAE: the one definition of each that trainer and services share."""

from rlhf.ops.advantages import gae
from rlhf.ops.kl import kl_penalty
from rlhf.ops.logprobs import LogprobOutput, logprobs_from_logits

__all__ = ["LogprobOutput", "gae", "kl_penalty", "logprobs_from_logits"]
