"""Advantage estimators by name: what each sampled token was worth, from rewards, values and the groups of completions.

    gae          Â_t = Σ_l (γλ)^l δ_{t+l}                               critic    clipped ratio
    a2c          Â_t = Σ_{k≥t} γ^{k-t} r_k - V_t                        critic    one step on -Â log π
    rloo         Â_i = R_i - mean of the others of its prompt           none      clipped ratio
    grpo         Â_i = (R_i - mean of its prompt) / std of its prompt   none      clipped ratio
    reinforce++  Â_t = Σ_{k≥t} γ^{k-t} r_k - mean over the batch        none      clipped ratio

Pure functions of tensors. Rewards are per token and hold score, shaping and KL penalty (`rewards.token_rewards`); R_i
is their sum over completion i. Rewards are whitened before, advantages after, by the step; for which estimators,
`settings.whitens_advantages` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.ops import gae
from rlhf.ppo.experience import Experience, together
from rlhf.ppo.settings import WITHOUT_CRITIC, PpoSettings

GROUP_STD_EPSILON = 1e-4
"""Beside the standard deviation of a group, as in TRL: completions that scored almost alike teach almost nothing."""


@dataclass(frozen=True)
class Estimate:
    """What a step aims at."""

    advantages: Tensor
    """[N] float32, 0 outside the response mask."""
    returns: Tensor | None
    """[N] float32, the critic's targets. None: no critic is trained."""


@dataclass(frozen=True)
class Estimator:
    """A way from rewards to advantages."""

    name: str
    clips: bool
    """Its loss is PPO's clipped ratio; False: -Â log π."""
    estimate: Callable[[Tensor, Tensor, Experience, PpoSettings], Estimate]

    @property
    def needs_critic(self) -> bool:
        return self.name not in WITHOUT_CRITIC

    def __call__(self, rewards: Tensor, values: Tensor, experience: Experience, settings: PpoSettings) -> Estimate:
        """
        Args:
            rewards: [N] float32, 0 outside the response mask.
            values: [N] float32, of the state before each token; not read without a critic.
        """
        return self.estimate(rewards, values, experience, settings)


def generalised(rewards: Tensor, values: Tensor, experience: Experience, settings: PpoSettings) -> Estimate:
    """Â_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, and returns Â + V.

    Source: Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv:1506.02438, eq. 16.
    """
    advantages = _gae(rewards, values, experience, settings.gamma, settings.gae_lambda)
    return Estimate(advantages, advantages + values)


def actor_critic(rewards: Tensor, values: Tensor, experience: Experience, settings: PpoSettings) -> Estimate:
    """Â_t = Σ_{k≥t} γ^{k-t} r_k - V_t up to the completion's end, where the value is 0: GAE with λ = 1.

    Source: Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", arXiv:1602.01783, section 4. That
    its step is PPO's first: Huang et al. 2022, "A2C is a special case of PPO", arXiv:2205.09123.
    """
    advantages = _gae(rewards, values, experience, settings.gamma, 1.0)
    return Estimate(advantages, advantages + values)


def leave_one_out(rewards: Tensor, values: Tensor, experience: Experience, settings: PpoSettings) -> Estimate:
    """Â_i = R_i - 1/(K - 1) Σ_{j≠i} R_j = K/(K - 1) (R_i - mean R), the same for each token of completion i.

    The whole completion is one action, its reward the score minus β times its KL. The baseline does not depend on
    completion i, so it biases nothing.

    Source: Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; for language models
    Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740, the paragraph on RLOO.
    """
    total, group = experience.sum_per_sequence(rewards).double(), _Groups(experience.groups)
    return _whole(total - (group.sum(total) - total) / (group.size - 1), experience)


def group_relative(rewards: Tensor, values: Tensor, experience: Experience, settings: PpoSettings) -> Estimate:
    """Â_i = (R_i - mean R) / (std R + ε), the same for each token of completion i; with `grpo_std` off, undivided.

    The paper has its KL in the loss: `kl.coef = 0`, `kl.loss_coef` above it. Divided, easy and hard prompts count
    alike; undivided it is (K - 1)/K of RLOO. The standard deviation is the one with Bessel's correction, as in TRL and
    verl.

    Source: Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1.2; undivided: Liu et al. 2025,
    "Understanding R1-Zero-Like Training", arXiv:2503.20783.
    """
    total, group = experience.sum_per_sequence(rewards).double(), _Groups(experience.groups)
    centred = total - group.sum(total) / group.size
    if settings.grpo_std:
        std = (group.sum(centred.square()) / (group.size - 1)).sqrt()
        centred = centred / (std + GROUP_STD_EPSILON)
    return _whole(centred, experience)


def reinforce_plus_plus(rewards: Tensor, values: Tensor, experience: Experience, settings: PpoSettings) -> Estimate:
    """Â_t = Σ_{k≥t} γ^{k-t} r_k - its mean over all sampled tokens of the batch.

    The step divides by the standard deviation over the batch, as the paper does, unless `whiten_advantages` is off.

    Source: Hu et al. 2025, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage
    Normalization", arXiv:2501.03262: r_t = 1[t = T] r(x, y) - β KL_t, normalised over the global batch.
    """
    to_go = _gae(rewards, torch.zeros_like(rewards), experience, settings.gamma, 1.0)
    mask = experience.response_mask
    return Estimate(torch.where(mask, to_go - to_go[mask].mean(), 0.0), None)


ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        Estimator("gae", True, generalised),
        Estimator("a2c", False, actor_critic),
        Estimator("rloo", True, leave_one_out),
        Estimator("grpo", True, group_relative),
        Estimator("reinforce++", True, reinforce_plus_plus),
    )
}


class _Groups:
    """Sums over the completions of one prompt.

    In float64: completions that scored alike then differ from their mean by 0, and not by a rounding that a small
    standard deviation would magnify.
    """

    def __init__(self, groups: Tensor) -> None:
        self._groups = groups
        self.size = torch.bincount(groups)[groups]
        """[S] int64: how many completions answer the same prompt."""

    def sum(self, values: Tensor) -> Tensor:
        """[S] -> [S] float64: for each completion, the sum over its group."""
        sums = torch.zeros(int(self._groups.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, self._groups, values)[self._groups]


def _whole(advantages: Tensor, experience: Experience) -> Estimate:
    """[S] -> the same advantage for each sampled token of a sequence."""
    per_token = advantages.float().repeat_interleave(experience.lengths)
    return Estimate(torch.where(experience.response_mask, per_token, 0.0), None)


def _gae(rewards: Tensor, values: Tensor, experience: Experience, gamma: float, lam: float) -> Tensor:
    """[N], through padded rows."""
    whole = together(experience)
    padded = gae(whole.pad(rewards), whole.pad(values), whole.pad(experience.response_mask), gamma, lam)
    advantages = torch.zeros_like(rewards)
    whole.pack(padded, advantages)
    return advantages
