"""One optimisation step of PPO, from rollouts to better weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf.errors import StageFailed
from rlhf.ppo.estimators import ESTIMATORS, Estimate
from rlhf.ppo.experience import Experience, MicroBatch, gather, minibatches
from rlhf.ppo.figures import StepFigures, step_figures
from rlhf.ppo.importance import importance_of
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Assessment, Learner, Targets
from rlhf.ppo.rewards import own_kl, shaped_scores, token_kl, token_rewards, whiten
from rlhf.ppo.settings import ShapingSettings
from rlhf.wire.records import Rollout

PLAIN = ShapingSettings()
Watch = Callable[[Sequence[Rollout], Experience, Assessment], None]


class PpoStep:
    """
    Args:
        generator: draws the order of sequences; its state is part of the checkpoint.
        blobs: folder of hidden states too large for a message; None: there are none.
        shaping: what becomes of scores.
    """

    def __init__(
        self,
        learner: Learner,
        kl: KlController,
        generator: torch.Generator,
        blobs: Path | None = None,
        shaping: ShapingSettings = PLAIN,
    ) -> None:
        self.learner = learner
        self.settings = learner.settings
        self.shaping = shaping
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

        scores = shaped_scores(experience, self.settings, self.shaping)
        penalty = token_kl(before, old_logprobs, experience.response_mask, self.kl.settings.estimator)
        rewards = token_rewards(experience, scores, penalty, kl_coef)
        own_penalty = kl_coef * own_kl(before, old_logprobs, experience.response_mask, self.kl.settings.estimator)
        estimate = self._estimate(experience, rewards, before.values, own_penalty)
        importance = importance_of(old_logprobs, experience, self.settings)
        advantages = estimate.advantages if importance is None else estimate.advantages * importance.weights
        targets = Targets(old_logprobs, before.ref_logprobs, before.values, advantages, estimate.returns)

        updates = [
            self.learner.improve(experience, minibatch, targets) for one_pass in passes for minibatch in one_pass
        ]
        kl_nats = self._kl_per_sequence(experience, before, old_logprobs)
        if self.learner.policy_learns:
            self.kl.update(kl_nats, experience.sequences)
        return step_figures(experience, before, rewards, targets, importance, updates, kl_nats, kl_coef)

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

    def _estimate(
        self, experience: Experience, rewards: Tensor, values: Tensor, own_penalty: Tensor | float = 0.0
    ) -> Estimate:
        """By the estimator of the settings, with rewards and advantages whitened if set.

        Args:
            own_penalty: [N], what each token has to answer for alone.
        """
        mask, settings = experience.response_mask, self.settings
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=not settings.whiten_rewards_mean)
        estimate = ESTIMATORS[settings.estimator](rewards, values, experience, settings)
        # Returns are the critic's targets: neither this nor whitening may touch them.
        advantages = estimate.advantages - own_penalty
        if settings.whitens_advantages:
            advantages = whiten(advantages, mask)
        return replace(estimate, advantages=advantages)

    def _kl_per_sequence(self, experience: Experience, before: Assessment, logprobs: Tensor) -> float:
        token_kl = logprobs - before.ref_logprobs if before.kl is None else before.kl
        return experience.sum_per_sequence(token_kl).mean().item()
