"""One optimisation step of PPO, from rollouts to better weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.errors import StageFailed
from rlhf.ops import gae
from rlhf.ppo.experience import Experience, MicroBatch, gather, minibatches
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Assessment, Learner, Targets, UpdateFigures
from rlhf.ppo.rewards import shaped_scores, token_kl, token_rewards, whiten
from rlhf.wire.records import Rollout

Watch = Callable[[Sequence[Rollout], Experience, Assessment], None]


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
    value_loss: float
    explained_variance: float
    """1 - var(returns - values) / var(returns), with the values before the step."""
    clip_fraction: float
    approx_kl: float
    first_ratio_error: float
    """max |ratio - 1| in the first minibatch: 0 with recomputed old log-probs."""
    service_logprob_error: float
    """max |policy service's log-prob - the trainer's|, over the batch."""
    policy_grad_norm: float
    critic_grad_norm: float
    response_tokens_mean: float
    ended_fraction: float


class PpoStep:
    """
    Args:
        generator: draws the order of sequences; its state is part of the checkpoint.
        blobs: folder of hidden states too large for a message; None: there are none.
    """

    def __init__(
        self, learner: Learner, kl: KlController, generator: torch.Generator, blobs: Path | None = None
    ) -> None:
        self.learner = learner
        self.settings = learner.settings
        self.kl = kl
        self.generator = generator
        self.blobs = blobs

    def __call__(self, rollouts: Sequence[Rollout], watch: Watch | None = None) -> StepFigures:
        """
        Args:
            watch: called with what the present weights say, before they change.
        """
        self._check_reference(rollouts)
        experience = gather(rollouts, self.blobs)
        passes = [list(self._minibatches(experience)) for _ in range(self.settings.epochs)]
        # The same micro-batches as the first pass: equal shapes make equal sums, so the first ratio is exactly 1.
        before = self.learner.assess(experience, [micro for minibatch in passes[0] for micro in minibatch])
        if watch is not None:
            watch(rollouts, experience, before)
        old_logprobs = before.logprobs if self.settings.old_logprobs == "recompute" else experience.service_logprobs
        kl_coef = self.kl.coef

        scores = shaped_scores(experience, self.settings)
        penalty = token_kl(before, old_logprobs, experience.response_mask, self.kl.settings.estimator)
        rewards = token_rewards(experience, scores, penalty, kl_coef)
        advantages, returns = self._estimate(experience, rewards, before.values)
        targets = Targets(old_logprobs, before.ref_logprobs, before.values, advantages, returns)

        updates = [
            self.learner.improve(experience, minibatch, targets) for one_pass in passes for minibatch in one_pass
        ]
        kl_nats = self._kl_per_sequence(experience, before, old_logprobs)
        self.kl.update(kl_nats, experience.sequences)
        return self._figures(experience, before, rewards, returns, updates, kl_nats=kl_nats, kl_coef=kl_coef)

    def _check_reference(self, rollouts: Sequence[Rollout]) -> None:
        """
        Raises:
            StageFailed: hidden states are of another model than the output layer.
        """
        layer = self.learner.reference
        others = {rollout.reference_sha256 for rollout in rollouts} - {layer.model_sha256 if layer else ""}
        if layer is not None and others:
            raise StageFailed(
                f"rollouts bring hidden states of the reference {min(others)[:12]}, but the trainer holds the output "
                f"layer of {layer.model_sha256[:12]}: the reference service was given another model in mid-run"
            )

    def _minibatches(self, experience: Experience) -> Iterator[list[MicroBatch]]:
        order = torch.randperm(experience.sequences, generator=self.generator)
        return minibatches(experience, self.settings.minibatches, self.settings.micro_batch_tokens, order)

    def _estimate(self, experience: Experience, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages, whitened if set, and returns, both [N]."""
        mask = experience.response_mask
        if self.settings.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=True)
        (whole,) = next(minibatches(experience, 1, 2**62, torch.arange(experience.sequences)))
        padded = gae(
            whole.pad(rewards), whole.pad(values), whole.pad(mask), self.settings.gamma, self.settings.gae_lambda
        )
        advantages = torch.zeros_like(rewards)
        whole.pack(padded, advantages)
        # Returns are the critic's targets: whitening must not touch them.
        returns = advantages + values
        return (whiten(advantages, mask) if self.settings.whiten_advantages else advantages), returns

    def _kl_per_sequence(self, experience: Experience, before: Assessment, logprobs: Tensor) -> float:
        token_kl = logprobs - before.ref_logprobs if before.kl is None else before.kl
        return experience.sum_per_sequence(token_kl).mean().item()

    def _figures(
        self,
        experience: Experience,
        before: Assessment,
        rewards: Tensor,
        returns: Tensor,
        updates: Sequence[UpdateFigures],
        *,
        kl_nats: float,
        kl_coef: float,
    ) -> StepFigures:
        mask = experience.response_mask
        residual = (returns - before.values)[mask]

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
            value_loss=mean("value_loss"),
            explained_variance=1.0 - (residual.var() / returns[mask].var().clamp_min(1e-8)).item(),
            clip_fraction=mean("clip_fraction"),
            approx_kl=mean("approx_kl"),
            first_ratio_error=updates[0].max_ratio_error,
            service_logprob_error=(before.logprobs - experience.service_logprobs)[mask].abs().max().item(),
            policy_grad_norm=mean("policy_grad_norm"),
            critic_grad_norm=mean("critic_grad_norm"),
            response_tokens_mean=mask.sum().item() / experience.sequences,
            ended_fraction=experience.ended_mask.float().mean().item(),
        )
