"""Policy and critic as the trainer holds them: one forward pass for both, and one update per minibatch.

Sequences are right-padded and attention is causal, so no real token ever sees padding, and no attention mask is needed.
The trunk sees padded sequences [B, T]; everything after it, the output layer first of all, sampled tokens alone, [n].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import StageFailed
from rlhf.models.adapters import dropping_out
from rlhf.models.causal import checkpoint_activations
from rlhf.models.compute import torch_dtype
from rlhf.models.output_layer import hidden_states, output_layer
from rlhf.models.reward import RewardModel
from rlhf.ops import LogprobOutput, PpoTerms, fused_linear_logprobs, ppo_loss
from rlhf.ppo.experience import Experience, MicroBatch
from rlhf.ppo.losses import value_loss
from rlhf.ppo.reference_layer import ReferenceLayer
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings


@dataclass(frozen=True)
class Assessment:
    """What the present weights say of an experience, before they change. All [N] float32, 0 outside the mask."""

    logprobs: Tensor
    ref_logprobs: Tensor
    """The reference's: as its service gave them, or from its hidden states. Outside the mask NaN where it gave them."""
    kl: Tensor | None
    """Exact KL(policy ‖ reference) of the distribution that each token was sampled from. None: log-probs were given."""
    entropy: Tensor
    values: Tensor
    """All 0 where there is no critic."""


@dataclass(frozen=True)
class Targets:
    """What an update aims at. All [N] float32."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor | None
    """None: no critic is trained."""


@dataclass(frozen=True)
class UpdateFigures:
    """One update, as means over the minibatch's sampled tokens; norms are those before clipping."""

    policy_loss: float
    value_loss: float | None
    """None: there is no critic."""
    clip_fraction: float
    approx_kl: float
    """½ E[(log ratio)²]: how far this update's weights are from those that sampled, in nats."""
    max_ratio_error: float
    """max |ratio - 1|."""
    policy_grad_norm: float
    critic_grad_norm: float | None


class Learner:
    """
    Args:
        policy: a causal language model; trained in place.
        critic: a scalar model, or None for a head on the policy's trunk; not used where the estimator needs none.
        reference: the reference's output layer, where it gives hidden states; frozen.
        temperature: at which completions are sampled; divides the logits here too.
        pad_id: fills the padding; any id in the vocabulary will do.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: RewardModel | None,
        settings: PpoSettings,
        critic_settings: CriticSettings,
        kl: KlSettings,
        *,
        reference: ReferenceLayer | None = None,
        temperature: float,
        pad_id: int,
    ) -> None:
        self.policy = policy
        self.critic = critic
        self.settings = settings
        self.critic_settings = critic_settings
        self.output_layer = output_layer(policy)
        self.reference = reference
        self.terms = PpoTerms(
            settings.clip_range, settings.highest_clip_range, kl.loss_coef, kl.loss_estimator, settings.entropy_coef,
            settings.dual_clip, ratio=settings.estimator != "a2c",
        )  # fmt: skip
        self.exact_loss = kl.exact_loss
        self.temperature = temperature
        self.pad_id = pad_id
        self.device = torch.device(settings.device)
        self.policy_learns = True
        """False while the critic warms up."""
        # Zeros: the first values, and so the first advantages, owe nothing to chance (lm-human-preferences, scale=0).
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False).to(self.device)
        nn.init.zeros_(self.value_head.weight)
        if settings.gradient_checkpointing:
            for model in (policy, critic):
                if model is not None:
                    checkpoint_activations(model)
        self.optimizers = self._optimizers()

    def assess(self, experience: Experience, micro_batches: Iterable[MicroBatch]) -> Assessment:
        """Log-probs, KL, entropy and values of every sampled token under the present weights."""
        logprobs, entropy, values, kl = torch.zeros(4, len(experience.token_ids))
        ref_logprobs = experience.ref_logprobs.clone()
        exact = experience.ref_hidden is not None
        with torch.no_grad():
            for micro in micro_batches:
                at = micro.sampled(experience.response_mask)
                tokens, own_values = self._forward(experience, micro, at, with_reference=exact)
                logprobs[at], entropy[at] = tokens.logprobs.cpu(), _cpu(tokens.entropy)
                if own_values is not None:
                    values[at] = own_values.cpu()
                if exact:
                    ref_logprobs[at], kl[at] = _cpu(tokens.ref_logprobs), _cpu(tokens.kl)
        return Assessment(logprobs, ref_logprobs, kl if exact else None, entropy, values)

    def improve(self, experience: Experience, minibatch: list[MicroBatch], targets: Targets) -> UpdateFigures:
        """One optimiser step of policy and critic."""
        tokens = sum(int(experience.response_mask[micro.indices].sum()) for micro in minibatch)
        dropping_out(self.policy, True)
        parts = [self._accumulate(experience, micro, targets, tokens) for micro in minibatch]
        dropping_out(self.policy, False)
        norms = {name: self._clip_and_step(name, optimizer) for name, optimizer in self.optimizers.items()}
        critic_norm = norms.get("critic", norms["policy"]) if self.settings.needs_critic else None
        return replace(_total(parts), policy_grad_norm=norms["policy"], critic_grad_norm=critic_norm)

    def begin_step(self, trained_steps: int) -> None:
        """What depends on how many steps were made: learning rates, whether the critic still learns alone, chance."""
        linear = self.settings.lr_schedule == "linear"
        self.set_learning_rates(1.0 - trained_steps / self.settings.steps if linear else 1.0)
        self.policy_learns = trained_steps >= self.critic_settings.warmup_steps
        # An adapter's dropout draws from torch's own generator; a step made again is to draw the same.
        torch.manual_seed(self.settings.seed + trained_steps)

    def set_learning_rates(self, factor: float) -> None:
        """Scale both learning rates, for a schedule."""
        rates = {"policy": self.settings.lr, "critic": self.critic_settings.lr}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor

    def _accumulate(self, experience: Experience, micro: MicroBatch, targets: Targets, tokens: int) -> UpdateFigures:
        at = micro.sampled(experience.response_mask)
        old_logprobs, ref_logprobs, advantages = (
            flat[at].to(self.device) for flat in (targets.old_logprobs, targets.ref_logprobs, targets.advantages)
        )
        found, values = self._forward(experience, micro, at, with_reference=self.exact_loss)
        if not self.exact_loss:
            found = found._replace(ref_logprobs=ref_logprobs)
        everything = torch.ones_like(at, dtype=torch.bool, device=self.device)
        policy_sum, clipped_mask = ppo_loss(found, old_logprobs, advantages, everything, self.terms)
        value_sum = None if values is None else self._value_loss(values, targets, at)
        self._backward(policy_sum, value_sum, tokens)
        log_ratio = found.logprobs.detach() - old_logprobs
        return UpdateFigures(
            policy_loss=policy_sum.item() / tokens,
            value_loss=None if value_sum is None else value_sum.item() / tokens,
            clip_fraction=clipped_mask.sum().item() / tokens,
            approx_kl=0.5 * log_ratio.square().sum().item() / tokens,
            max_ratio_error=log_ratio.expm1().abs().max().item(),
            policy_grad_norm=0.0,
            critic_grad_norm=None,
        )

    def _value_loss(self, values: Tensor, targets: Targets, at: Tensor) -> Tensor:
        assert targets.returns is not None, "an estimator that needs a critic gives returns"
        old_values, returns = (flat[at].to(self.device) for flat in (targets.old_values, targets.returns))
        return value_loss(values, old_values, returns, self.settings.value_clip_range)

    def _backward(self, policy_sum: Tensor, value_sum: Tensor | None, tokens: int) -> None:
        """Of whatever learns."""
        losses = [policy_sum] if self.policy_learns else []
        if value_sum is not None:
            losses.append((self.critic_settings.coef if self.critic is None else 1.0) * value_sum)
        (torch.stack(losses).sum() / tokens).backward()  # type: ignore[no-untyped-call]

    def _forward(
        self, experience: Experience, micro: MicroBatch, at: Tensor, *, with_reference: bool
    ) -> tuple[LogprobOutput, Tensor | None]:
        """Of the sampled tokens at these positions: log-probs and what goes with them, and values (None without a
        critic); each [n] float32."""
        token_ids = micro.pad(experience.token_ids, self.pad_id).to(self.device)
        # Of the states before sampled tokens: the first token of a sequence has none, and is never sampled.
        before_mask = micro.pad(experience.response_mask).to(self.device)[:, 1:]
        labels = token_ids[:, 1:][before_mask]
        with torch.autocast(self.device.type, torch_dtype(self.settings.dtype), self.settings.dtype != "float32"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.policy_learns):
                states = hidden_states(self.policy, input_ids=token_ids, use_cache=False)[:, :-1][before_mask]
                tokens = fused_linear_logprobs(
                    states, self.output_layer.weight, labels, lm_head_bias=self.output_layer.bias,
                    temperature=self.temperature, **(self._reference_of(experience, at) if with_reference else {}),
                )  # fmt: skip
            values = self._values(token_ids, micro, before_mask, states) if self.settings.needs_critic else None
        return tokens, values

    def _values(self, token_ids: Tensor, micro: MicroBatch, before_mask: Tensor, states: Tensor) -> Tensor:
        """[n] float32: the value of token t is that of the state before it, the critic's output at t - 1."""
        if self.critic is None:
            return self.value_head(states).squeeze(-1).float()  # type: ignore[no-any-return]
        raw = self.critic.token_values(token_ids, micro.place_mask.to(self.device))[:, :-1][before_mask]
        return ((raw - self.critic.mean) / self.critic.std).float()

    def _reference_of(self, experience: Experience, at: Tensor) -> dict[str, Any]:
        """The reference's part in `fused_linear_logprobs`."""
        states, layer = experience.ref_hidden_of(at), self.reference
        assert states is not None, "settings ask the reference for hidden states then"
        assert layer is not None
        return {
            "ref_hidden_states": states.to(layer.weight),
            "ref_lm_head_weight": layer.weight,
            "ref_lm_head_bias": layer.bias,
        }

    def _optimizers(self) -> dict[str, torch.optim.Adam]:
        policy_parameters = [p for p in self.policy.parameters() if p.requires_grad]
        if self.settings.needs_critic and self.critic is None:
            policy_parameters += self.value_head.parameters()
        optimizers = {"policy": self._adam(policy_parameters, self.settings.lr)}
        if self.settings.needs_critic and self.critic is not None:
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
        if not self.settings.needs_critic:
            return {"policy": self.policy}
        if self.critic is None:
            return {"policy": self.policy, "value_head": self.value_head}
        return {"policy": self.policy, "critic": self.critic}


def _cpu(values: Tensor | None) -> Tensor:
    assert values is not None, "asked for"
    return values.cpu()


def _total(parts: list[UpdateFigures]) -> UpdateFigures:
    """Micro-batches' shares of a minibatch's means, added up."""

    def add(name: str) -> Any:
        return sum(getattr(part, name) for part in parts)

    return UpdateFigures(
        policy_loss=add("policy_loss"),
        value_loss=None if parts[0].value_loss is None else add("value_loss"),
        clip_fraction=add("clip_fraction"),
        approx_kl=add("approx_kl"),
        max_ratio_error=max(part.max_ratio_error for part in parts),
        policy_grad_norm=0.0,
        critic_grad_norm=None,
    )
