"""Policy and critic as the trainer holds them: one forward pass for both, and one update per minibatch.

Sequences are right-padded and attention is causal, so no real token ever sees padding, and no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import StageFailed
from rlhf.models.compute import torch_dtype
from rlhf.models.reward import RewardModel
from rlhf.ops import logprobs_from_logits
from rlhf.ppo.experience import Experience, MicroBatch
from rlhf.ppo.losses import policy_loss, value_loss
from rlhf.ppo.settings import CriticSettings, PpoSettings


@dataclass(frozen=True)
class Assessment:
    """What the present weights say of an experience, before they change. All [N] float32, 0 outside the mask."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


@dataclass(frozen=True)
class Targets:
    """What an update aims at. All [N] float32."""

    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class UpdateFigures:
    """One update, as means over the minibatch's sampled tokens; norms are those before clipping."""

    policy_loss: float
    value_loss: float
    clip_fraction: float
    approx_kl: float
    """½ E[(log ratio)²]: how far this update's weights are from those that sampled, in nats."""
    max_ratio_error: float
    """max |ratio - 1|."""
    policy_grad_norm: float
    critic_grad_norm: float


class Learner:
    """
    Args:
        policy: a causal language model; trained in place.
        critic: a scalar model, or None for a head on the policy's trunk.
        temperature: at which completions are sampled; divides the logits here too.
        pad_id: fills the padding; any id in the vocabulary will do.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: RewardModel | None,
        settings: PpoSettings,
        critic_settings: CriticSettings,
        *,
        temperature: float,
        pad_id: int,
    ) -> None:
        self.policy = policy
        self.critic = critic
        self.settings = settings
        self.critic_settings = critic_settings
        self.temperature = temperature
        self.pad_id = pad_id
        self.device = torch.device(settings.device)
        # Zeros: the first values, and so the first advantages, owe nothing to chance (lm-human-preferences, scale=0).
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False).to(self.device)
        nn.init.zeros_(self.value_head.weight)
        self.optimizers = self._optimizers()

    def assess(self, experience: Experience, micro_batches: Iterable[MicroBatch]) -> Assessment:
        """Log-probs, entropy and values of every sampled token under the present weights."""
        zeros = torch.zeros(len(experience.token_ids))
        assessment = Assessment(zeros.clone(), zeros.clone(), zeros.clone())
        with torch.no_grad():
            for micro in micro_batches:
                logprobs, entropy, values = self._forward(experience, micro)
                micro.pack(logprobs, assessment.logprobs)
                micro.pack(entropy, assessment.entropy)
                micro.pack(values, assessment.values)
        return assessment

    def improve(self, experience: Experience, minibatch: list[MicroBatch], targets: Targets) -> UpdateFigures:
        """One optimiser step of policy and critic."""
        tokens = sum(int(experience.response_mask[micro.indices].sum()) for micro in minibatch)
        parts = [self._accumulate(experience, micro, targets, tokens) for micro in minibatch]
        norms = {name: self._clip_and_step(name, optimizer) for name, optimizer in self.optimizers.items()}
        return replace(
            _total(parts), policy_grad_norm=norms["policy"], critic_grad_norm=norms.get("critic", norms["policy"])
        )

    def set_learning_rates(self, factor: float) -> None:
        """Scale both learning rates, for a schedule."""
        rates = {"policy": self.settings.lr, "critic": self.critic_settings.lr}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor

    def _accumulate(self, experience: Experience, micro: MicroBatch, targets: Targets, tokens: int) -> UpdateFigures:
        mask = micro.pad(experience.response_mask).to(self.device)
        old_logprobs, old_values, advantages, returns = (
            micro.pad(flat).to(self.device)
            for flat in (targets.old_logprobs, targets.old_values, targets.advantages, targets.returns)
        )
        logprobs, entropy, values = self._forward(experience, micro)
        policy_sum, clipped_mask = policy_loss(logprobs, old_logprobs, advantages, mask, self.settings.clip_range)
        value_sum = value_loss(values, old_values, returns, mask, self.settings.value_clip_range)
        value_weight = self.critic_settings.coef if self.critic is None else 1.0
        loss = policy_sum + value_weight * value_sum - self.settings.entropy_coef * entropy[mask].sum()
        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        log_ratio = (logprobs.detach() - old_logprobs)[mask]
        return UpdateFigures(
            policy_loss=policy_sum.item() / tokens,
            value_loss=value_sum.item() / tokens,
            clip_fraction=clipped_mask.sum().item() / tokens,
            approx_kl=0.5 * log_ratio.square().sum().item() / tokens,
            max_ratio_error=log_ratio.expm1().abs().max().item(),
            policy_grad_norm=0.0,
            critic_grad_norm=0.0,
        )

    def _forward(self, experience: Experience, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, entropy and values, [B, T] float32 on the device, of each sampled token; 0 elsewhere.

        The value of token t is that of the state before it: the critic's output at t - 1.
        """
        token_ids = micro.pad(experience.token_ids, self.pad_id).to(self.device)
        mask = micro.pad(experience.response_mask).to(self.device)
        # Logits are wanted from the first state before a sampled token on; the prompts' need not be computed.
        first = int(mask.any(0).nonzero()[0])
        with torch.autocast(self.device.type, torch_dtype(self.settings.dtype), self.settings.dtype != "float32"):
            outputs = self.policy(
                input_ids=token_ids,
                use_cache=False,
                logits_to_keep=token_ids.shape[1] - first + 1,
                output_hidden_states=self.critic is None,
            )
            if self.critic is None:
                states = self.value_head(outputs.hidden_states[-1]).squeeze(-1)
            else:
                raw = self.critic.token_values(token_ids, micro.place_mask.to(self.device))
                states = (raw - self.critic.mean) / self.critic.std
        labels = token_ids[:, first:].masked_fill(~mask[:, first:], -100)
        scored = logprobs_from_logits(outputs.logits[:, :-1], labels, self.temperature, return_entropy=True)
        assert scored.entropy is not None
        values = nn.functional.pad(states[:, :-1].float(), (1, 0)).masked_fill(~mask, 0.0)
        return nn.functional.pad(scored.logprobs, (first, 0)), nn.functional.pad(scored.entropy, (first, 0)), values

    def _optimizers(self) -> dict[str, torch.optim.Adam]:
        policy_parameters = [p for p in self.policy.parameters() if p.requires_grad]
        if self.critic is None:
            policy_parameters += self.value_head.parameters()
        optimizers = {"policy": self._adam(policy_parameters, self.settings.lr)}
        if self.critic is not None:
            optimizers["critic"] = self._adam(self.critic.parameters(), self.critic_settings.lr)
        return optimizers

    def _adam(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(list(parameters), lr=lr, eps=self.settings.adam_epsilon)

    def _clip_and_step(self, name: str, optimizer: torch.optim.Adam) -> float:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        if not norm.isfinite():
            raise StageFailed(
                f"the {name}'s gradient is {norm.item()}; nothing was changed. Lower its learning rate, use float32, "
                "or look for a score that is out of all proportion in the newest sample table"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def modules(self) -> Mapping[str, nn.Module]:
        """What a checkpoint keeps, by name."""
        if self.critic is None:
            return {"policy": self.policy, "value_head": self.value_head}
        return {"policy": self.policy, "critic": self.critic}


def _total(parts: list[UpdateFigures]) -> UpdateFigures:
    """Micro-batches' shares of a minibatch's means, added up."""

    def add(name: str) -> Any:
        return sum(getattr(part, name) for part in parts)

    return UpdateFigures(
        policy_loss=add("policy_loss"),
        value_loss=add("value_loss"),
        clip_fraction=add("clip_fraction"),
        approx_kl=add("approx_kl"),
        max_ratio_error=max(part.max_ratio_error for part in parts),
        policy_grad_norm=0.0,
        critic_grad_norm=0.0,
    )
