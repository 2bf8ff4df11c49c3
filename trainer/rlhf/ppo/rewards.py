"""From scores and KL to one reward per token, and the whitening of rewards and advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ops import kl_penalty
from rlhf.ppo.experience import Experience
from rlhf.ppo.settings import KlSettings, PpoSettings


def shaped_scores(experience: Experience, settings: PpoSettings) -> Tensor:
    """[S]: scores after the missing-end penalty and the clip.

    `replace` is what OpenAI's lm-human-preferences does (score := -1), `subtract` what TRL's `missing_eos_penalty`
    does.
    """
    scores = experience.scores
    if settings.missing_eos_penalty is not None:
        if settings.missing_eos == "replace":
            penalised = torch.full_like(scores, -settings.missing_eos_penalty)
        else:
            penalised = scores - settings.missing_eos_penalty
        scores = torch.where(experience.ended_mask, scores, penalised)
    if settings.score_clip is not None:
        scores = scores.clamp(-settings.score_clip, settings.score_clip)
    return scores


def token_rewards(
    experience: Experience, scores: Tensor, logprobs: Tensor, kl_coef: float, kl: KlSettings
) -> tuple[Tensor, Tensor]:
    """Rewards r_t = token reward_t - β KL_t, plus the score at the last sampled token (Ziegler et al. 2019, eq. 2).

    Args:
        scores: [S]
        logprobs: [N], the policy's at the time of sampling.

    Returns:
        rewards [N] and the KL estimate [N], both 0 outside the response mask.
    """
    kl_estimate = kl_penalty(logprobs, experience.ref_logprobs, kl.estimator)
    # Outside the mask both log-probs are NaN: select, since NaN times 0 is NaN.
    kl_estimate = torch.where(experience.response_mask, kl_estimate, 0.0)
    rewards = experience.token_rewards - kl_coef * kl_estimate
    rewards[experience.last_response_index] += scores
    return rewards, kl_estimate


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Masked values to variance 1 and, unless `keep_mean`, to mean 0. Outside the mask they stay.

    The variance is the biased one, as in lm-human-preferences; TRL's masked_var applies Bessel's correction, a factor
    of n / (n - 1).
    """
    counted = values[mask]
    mean = counted.mean()
    whitened = (counted - mean) * torch.rsqrt(counted.var(correction=0) + 1e-8)
    if keep_mean:
        whitened = whitened + mean
    return values.masked_scatter(mask, whitened)
