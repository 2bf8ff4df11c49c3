"""From scores and KL to one reward per token, and the whitening of rewards and advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ops import kl_penalty
from rlhf.ppo.experience import Experience
from rlhf.ppo.learner import Assessment
from rlhf.ppo.settings import PpoSettings, ShapingSettings

PLAIN = ShapingSettings()


def shaped_scores(experience: Experience, settings: PpoSettings, shaping: ShapingSettings = PLAIN) -> Tensor:
    """[S]: scores after the penalties for spread and a missing end, the clip and the length penalty, in this order: a
    clip holds back a reward model that exaggerates, and must not swallow the price of a token.

    `replace` is what OpenAI's lm-human-preferences does (score := -1 without the truncation token), `subtract` what
    TRL's `missing_eos_penalty` does.
    """
    scores = experience.scores - shaping.spread_penalty * experience.spreads
    if settings.missing_eos_penalty is not None:
        if settings.missing_eos == "replace":
            penalised = torch.full_like(scores, -settings.missing_eos_penalty)
        else:
            penalised = scores - settings.missing_eos_penalty
        truncated_mask = torch.tensor([shaping.truncates(text) for text in experience.texts])
        scores = torch.where(experience.ended_mask | truncated_mask, scores, penalised)
    if settings.score_clip is not None:
        scores = scores.clamp(-settings.score_clip, settings.score_clip)
    if shaping.length_penalty:
        beyond = (experience.sum_per_sequence(torch.ones(())) - shaping.length_free_tokens).clamp_min(0)
        scores = scores - shaping.length_penalty * beyond
    return scores


def token_rewards(experience: Experience, scores: Tensor, token_kl: Tensor, kl_coef: float) -> Tensor:
    """Rewards r_t = token reward_t - β KL_t, plus the score at the last sampled token (Ziegler et al. 2019, eq. 2).

    Args:
        scores: [S]
        token_kl: [N], of `token_kl`.

    Returns:
        [N], 0 outside the response mask.
    """
    rewards = experience.token_rewards - kl_coef * token_kl
    rewards[experience.last_response_index] += scores
    return rewards


def token_kl(before: Assessment, logprobs: Tensor, response_mask: Tensor, estimator: str) -> Tensor:
    """[N] KL(policy ‖ reference) at each sampled token, 0 elsewhere: estimated from that token, or exact.

    Args:
        logprobs: [N], the policy's at the time of sampling.
        estimator: of `KlSettings`; `exact` is of the weights before the step, whatever sampled.
    """
    if estimator == "exact":
        assert before.kl is not None, "settings ask the reference for hidden states then"
        return before.kl
    estimate = kl_penalty(logprobs, before.ref_logprobs, estimator)  # type: ignore[arg-type]
    # Outside the mask both log-probs are NaN: select, since NaN times 0 is NaN.
    return torch.where(response_mask, estimate, 0.0)


def own_kl(before: Assessment, logprobs: Tensor, response_mask: Tensor, estimator: str) -> Tensor:
    """[N] k1 - KL at each sampled token: what the advantage of that very token lacks where the penalty is `exact`; 0
    with other estimators.

    The KL of a state is the same whatever token is sampled there. As a reward it tells earlier tokens that they led to
    a costly state, but holds back none of its own state's: the policy would leave the reference for good. k1 does hold
    them back. Given the state its mean is the KL, so the difference adds E[(k1 - KL) ∇ log π] = ∇ KL and nothing else.

    Args:
        see `token_kl`.
    """
    if estimator != "exact":
        return torch.zeros_like(logprobs)
    return token_kl(before, logprobs, response_mask, "k1") - token_kl(before, logprobs, response_mask, "exact")


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
