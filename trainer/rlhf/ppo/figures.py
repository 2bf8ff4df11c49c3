"""What a step says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf.ppo.experience import Experience
from rlhf.ppo.importance import Importance
from rlhf.ppo.learner import Assessment, Targets, UpdateFigures


@dataclass(frozen=True)
class StepFigures:
    """One step, for metrics.jsonl. Means are over completions or over sampled tokens, never over padding."""

    score_mean: float
    score_std: float
    reward_mean: float
    """Per completion: shaped score minus KL penalty."""
    kl_mean: float
    """Nats per completion, policy against reference, before the step: over sampled tokens, the sum of k1, or of the
    exact KL where the reference sends hidden states."""
    kl_coef: float
    entropy: float
    """Nats per token."""
    policy_loss: float
    value_loss: float | None
    """None, as in what follows of values: there is no critic."""
    explained_variance: float | None
    """1 - var(returns - values) / var(returns), with the values before the step."""
    clip_fraction: float
    approx_kl: float
    first_ratio_error: float
    """max |ratio - 1| in the first minibatch: 0 with recomputed old log-probs."""
    service_logprob_error: float
    """max |policy service's log-prob - the trainer's|, over the batch."""
    policy_grad_norm: float
    critic_grad_norm: float | None
    response_tokens_mean: float
    ended_fraction: float
    importance_mean: float | None = None
    """Of the decoupled objective's weights, as applied; far from 1: the rollouts are too old. None: not its weights."""
    importance_capped_fraction: float | None = None
    """Share of tokens whose weight was above `importance_cap`."""


def step_figures(
    experience: Experience,
    before: Assessment,
    rewards: Tensor,
    targets: Targets,
    importance: Importance | None,
    updates: Sequence[UpdateFigures],
    kl_nats: float,
    kl_coef: float,
) -> StepFigures:
    """
    Args:
        rewards: [N], as the estimator got them but not whitened.
        kl_nats: per completion.
        kl_coef: which the rewards were made with.
    """
    mask = experience.response_mask

    def mean(name: str) -> float:
        return float(sum(getattr(update, name) for update in updates)) / len(updates)

    return StepFigures(
        score_mean=experience.scores.mean().item(),
        score_std=experience.scores.std(correction=0).item(),
        reward_mean=experience.sum_per_sequence(rewards).mean().item(),
        kl_mean=kl_nats,
        kl_coef=kl_coef,
        entropy=before.entropy[mask].mean().item(),
        policy_loss=mean("policy_loss"),
        value_loss=mean("value_loss") if targets.returns is not None else None,
        explained_variance=_explained_variance(targets, mask),
        clip_fraction=mean("clip_fraction"),
        approx_kl=mean("approx_kl"),
        first_ratio_error=updates[0].max_ratio_error,
        service_logprob_error=(before.logprobs - experience.service_logprobs)[mask].abs().max().item(),
        policy_grad_norm=mean("policy_grad_norm"),
        critic_grad_norm=mean("critic_grad_norm") if targets.returns is not None else None,
        response_tokens_mean=mask.sum().item() / experience.sequences,
        ended_fraction=experience.ended_mask.float().mean().item(),
        importance_mean=None if importance is None else importance.weights[mask].mean().item(),
        importance_capped_fraction=None if importance is None else importance.capped_fraction,
    )


def _explained_variance(targets: Targets, mask: Tensor) -> float | None:
    if targets.returns is None:
        return None
    returns, values = targets.returns[mask], targets.old_values[mask]
    return 1.0 - ((returns - values).var() / returns.var().clamp_min(1e-8)).item()
