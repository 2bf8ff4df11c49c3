"""Builds what the trainer works with from its settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ModelError, SettingsError
from rlhf.models.adapters import add_adapter
from rlhf.models.causal import attend_with, disable_dropout, load_causal_lm, weights_sha256
from rlhf.models.folders import start_model
from rlhf.models.output_layer import output_layer
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf.policy.settings import SamplingSettings
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Learner
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.reference_layer import ReferenceLayer, fetch_reference
from rlhf.ppo.step import PpoStep
from rlhf.settings.run import Settings

BYTES_PER_TOKEN = 24
"""Of a completion in the stream: id, mask, two log-probs, a token reward, and as much again for text and names."""


def build_step(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    reference_of: Callable[[Settings, int], ReferenceLayer] | None = None,
) -> PpoStep:
    """Policy, the critic if the estimator needs one, and their optimisers as at the start of a run; where KL is exact,
    the reference's output layer.

    Args:
        reference_of: gives that layer, for the policy's vocabulary size. None: the reference service is asked.
    """
    check_penalty(settings)
    folder = settings.ppo.model or start_model(settings)
    # Weights stay in float32 whatever the forward pass computes in: a step of 1e-6 vanishes in bfloat16.
    policy = load_causal_lm(folder, device=settings.ppo.device)
    critic = _build_critic(settings, policy, tokenizer)
    for module in (policy, critic):
        if module is not None:
            disable_dropout(module)
            attend_with(module, settings.ppo.attention)
    if settings.lora.rank:
        add_adapter(policy, settings.lora, weights_sha256(folder), settings.ppo.seed)
    learner = Learner(
        policy,
        critic,
        settings.ppo,
        settings.critic,
        settings.kl,
        reference=(reference_of or _asked)(settings, len(output_layer(policy).weight)) if settings.kl.exact else None,
        temperature=settings.sampling.temperature,
        pad_id=tokenizer.pad_token_id or 0,
    )
    generator = torch.Generator().manual_seed(settings.ppo.seed)
    blobs = settings.ppo.blobs or settings.paths.blobs
    return PpoStep(learner, KlController(settings.kl), generator, blobs, settings.shaping)


def check_sampling(sampling: SamplingSettings) -> None:
    """
    Raises:
        SettingsError: a filter is set. Completions would come from another distribution than the one whose log-probs
            trainer and reference compute, and neither ratio nor KL would mean anything.
    """
    for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        received = getattr(sampling, name)
        if received != neutral:
            raise SettingsError(
                f"sampling.{name}: PPO samples from the policy as it is, so {neutral} is needed; {received} received"
            )


def check_penalty(settings: Settings) -> None:
    """
    Raises:
        SettingsError: advantages are in other units than rewards, so a token's own share of an exact penalty cannot be
            taken off them.
    """
    if settings.kl.estimator != "exact" or settings.kl.coef == 0:
        return
    for name, rescales in (
        ('ppo.estimator = "grpo"', settings.ppo.estimator == "grpo"),
        ("ppo.whiten_rewards", settings.ppo.whiten_rewards),
    ):
        if rescales:
            raise SettingsError(
                f'kl.estimator: "exact" does not go with {name}, which puts rewards into other units; use "k1", or put '
                'the KL into the loss (kl.coef = 0, kl.loss_coef, kl.loss_estimator = "exact")'
            )


def check_warmup(settings: Settings) -> None:
    """
    Raises:
        SettingsError: there is no critic to warm up, or no step would be left in which the policy learns.
    """
    steps = settings.critic.warmup_steps
    if steps and not settings.ppo.needs_critic:
        raise SettingsError(
            f'critic.warmup_steps: ppo.estimator = "{settings.ppo.estimator}" has no critic, so 0 is needed; '
            f"{steps} received"
        )
    if steps >= settings.ppo.steps:
        raise SettingsError(
            f"critic.warmup_steps: the policy learns only after them, so fewer than ppo.steps, {settings.ppo.steps}, "
            f"are needed; {steps} received"
        )


def check_budget(settings: Settings, prompts: list[EncodedPrompt], hidden_size: int) -> None:
    """A stream that cannot hold the batches between two acknowledgements would never empty: the workers would wait for
    room, the trainer for rollouts.

    Raises:
        SettingsError: the stream's bounds are too small for one batch, or the batch for its minibatches.
    """
    ppo, redis = settings.ppo, settings.redis
    batch = ppo.batch_prompts * (ppo.max_staleness + 1)
    longest = max(len(prompt.token_ids) for prompt in prompts) + settings.sampling.max_new_tokens
    # Of the reference, which has about the policy's size; larger answers lie in files.
    hidden_bytes = min(4 * hidden_size * longest, settings.reference.inline_bytes) if settings.kl.exact else 0
    needed_bytes = batch * (512 + ppo.completions * (256 + BYTES_PER_TOKEN * longest + hidden_bytes))
    if batch > redis.max_entries // 2:
        raise SettingsError(
            f"redis.max_entries: {redis.max_entries} is too small; one step's rollouts are up to {batch} entries, and "
            "half the stream must hold them"
        )
    if needed_bytes > redis.max_mib * 2**20 // 2:
        raise SettingsError(
            f"redis.max_mib: {redis.max_mib} is too small; one step's rollouts are up to {needed_bytes / 2**20:.0f} "
            "MiB, and half the stream must hold them"
        )
    if ppo.minibatches > ppo.batch_prompts * ppo.completions:
        raise SettingsError(
            f"ppo.minibatches: at most one per completion, {ppo.batch_prompts * ppo.completions}, is possible; "
            f"{ppo.minibatches} received"
        )


def check_critic_context(step: PpoStep, prompts: list[EncodedPrompt], max_new_tokens: int) -> None:
    """
    Raises:
        SettingsError: the critic cannot read the longest sequence that the policy may write.
    """
    policy, critic = step.learner.policy, step.learner.critic
    if critic is None:
        return
    longest = max(len(prompt.token_ids) for prompt in prompts) + max_new_tokens
    longest = min(longest, policy.config.get_text_config().max_position_embeddings)
    context = critic.classifier.config.get_text_config().max_position_embeddings
    if longest > context:
        raise SettingsError(
            f"sampling.max_new_tokens: sequences of up to {longest} tokens do not fit into the critic's context of "
            f"{context}; lower it, or start the critic from the policy (critic.init_from)"
        )


def _asked(settings: Settings, vocab_size: int) -> ReferenceLayer:
    return fetch_reference(settings.ppo, vocab_size)


def _build_critic(
    settings: Settings, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RewardModel | None:
    if settings.critic.kind == "shared" or not settings.ppo.needs_critic:
        return None
    device = settings.ppo.device
    if settings.critic.init_from == "policy":
        critic = RewardModel.new(settings.ppo.model or start_model(settings), device=device)
        torch.nn.init.zeros_(critic.head.weight)
        return critic
    folder = settings.critic.model or settings.paths.reward_model
    critic = RewardModel.load(folder, device=device)
    # A critic reads the policy's tokens; a reward model over other tokens would see noise.
    if tokenizer_sha256(load_tokenizer(folder)) != tokenizer_sha256(tokenizer):
        raise ModelError(
            f"{folder}: the reward model has another tokenizer than the policy, so the critic cannot start from it; "
            'set critic.init_from = "policy"'
        )
    return critic
