"""Log-probs, exact KL, entropy, PPO's loss and GAE: the one definition of each, and kernels that agree with it."""

from rlhf.ops.advantages import gae
from rlhf.ops.kl import kl_penalty
from rlhf.ops.linear import fused_linear_logprobs
from rlhf.ops.logprobs import logprobs_from_logits, logprobs_kl_from_logits
from rlhf.ops.losses import PpoTerms, policy_gradient_loss, policy_loss, ppo_loss
from rlhf.ops.output import LogprobOutput
from rlhf.ops.ppo import PpoLossOutput, fused_linear_ppo_loss

__all__ = [
    "LogprobOutput",
    "PpoLossOutput",
    "PpoTerms",
    "fused_linear_logprobs",
    "fused_linear_ppo_loss",
    "gae",
    "kl_penalty",
    "logprobs_from_logits",
    "logprobs_kl_from_logits",
    "policy_gradient_loss",
    "policy_loss",
    "ppo_loss",
]
