"""How the learner learns: clips, a critic that warms up alone, activations computed again, bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf.errors import ModelError, SettingsError
from rlhf.models.causal import attend_with, checkpoint_activations
from rlhf.ops import policy_gradient_loss, policy_loss
from rlhf.ppo.checkpoint import capture, restore
from rlhf.ppo.experience import gather, minibatches
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings
from rlhf.ppo.setup import check_warmup
from rlhf.settings.run import Settings
from support.rollouts import sampled_rollouts
from support.steps import tiny_step, weights_of
from support.tiny import tiny_lm

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9]]


def some_rollouts(step, prompts=PROMPTS, seed=1):
    policy = step.learner.policy
    generator = torch.Generator().manual_seed(seed)
    return sampled_rollouts(policy, policy, prompts, lambda r: float(len(set(r))), new_tokens=6, generator=generator)


def losses(ratio, advantage, **clips):
    """Of one token, and whether it was held back."""
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    mask = torch.ones(1, dtype=torch.bool)
    loss, clipped = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), mask, **clips)
    loss.backward()
    return pytest.approx(loss.item(), abs=1e-5), clipped.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "clipped"),
    [
        (10.0, -2.0, None, 20.0, False),  # a negative advantage has no bound of its own
        (10.0, -2.0, 3.0, 6.0, True),
        (2.0, -2.0, 3.0, 4.0, False),
        (10.0, 2.0, 3.0, -2.4, True),  # a positive one has the clip's
        (0.5, -2.0, 3.0, 1.6, True),
        (1.0, -2.0, 3.0, 2.0, False),
    ],
)
def test_dual_clip_bounds_what_a_negative_advantage_costs(ratio, advantage, dual_clip, loss, clipped):
    """Ye et al. 2020: max(min(ρ A, clip(ρ) A), c A) where A < 0."""
    found, held, gradient = losses(ratio, advantage, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)
    assert (found, held) == (loss, clipped)
    assert (gradient == 0) == clipped


def test_two_clip_ranges():
    """Yu et al. 2025 (DAPO), eq. 10: a probability may grow further than it may shrink."""
    for ratio, advantage, loss in ((1.25, 1.0, -1.25), (1.4, 1.0, -1.28), (0.75, -1.0, 0.8), (0.9, -1.0, 0.9)):
        assert losses(ratio, advantage, clip_low=0.2, clip_high=0.28)[0] == loss


def test_clips_of_the_settings_reach_the_loss():
    terms = tiny_step(clip_range=0.1, clip_range_high=0.3, dual_clip=2.0).learner.terms
    assert (terms.clip_low, terms.clip_high, terms.dual_clip, terms.ratio) == (0.1, 0.3, 2.0, True)
    assert tiny_step(clip_range=0.1).learner.terms.clip_high == 0.1
    assert not tiny_step(estimator="a2c", epochs=1).learner.terms.ratio


def test_an_entropy_bonus_and_a_penalty_in_the_loss_reach_it_too():
    terms = tiny_step(entropy_coef=0.03, kl=KlSettings(loss_coef=0.2, loss_estimator="k2")).learner.terms
    assert (terms.entropy_coef, terms.kl_coef, terms.kl_estimator) == (0.03, 0.2, "k2")


@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_an_entropy_bonus_raises_the_entropy(coef):
    """Nothing else teaches anything here: all rewards are alike."""
    step = tiny_step(
        estimator="reinforce++", kl=KlSettings(coef=0.0), lr=3e-3, entropy_coef=coef, whiten_advantages=False
    )
    reference, found = copy.deepcopy(step.learner.policy), []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rollouts = sampled_rollouts(
            step.learner.policy, reference, PROMPTS * 4, lambda r: 1.0, new_tokens=6, generator=generator
        )
        found.append(step(rollouts).entropy)
    moved = not weights_of(step.learner.policy).equal(weights_of(reference))
    assert moved == (coef > 0)
    assert coef == 0 or found[-1] > found[0] + 0.1


def test_the_adaptive_coefficient_is_part_of_what_a_checkpoint_keeps():
    kl = KlSettings(coef=0.1, adaptive=True, horizon=10.0)
    step, other = (tiny_step(kl=kl, critic=CriticSettings(kind="shared")) for _ in range(2))
    step(some_rollouts(step))
    assert step.kl.coef != 0.1
    restore(other, *capture(step))
    assert other.kl.coef == step.kl.coef


def test_the_policy_gradient_ignores_what_lies_outside_the_mask():
    logprobs = torch.tensor([-1.0, float("nan")], requires_grad=True)
    loss = policy_gradient_loss(logprobs, torch.tensor([3.0, float("nan")]), torch.tensor([True, False]))
    loss.backward()
    assert (loss.item(), logprobs.grad.tolist()) == (3.0, [-3.0, 0.0])


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_while_the_critic_warms_up_it_alone_learns(kind):
    kl = KlSettings(coef=0.1, adaptive=True)
    step = tiny_step(critic=CriticSettings(kind=kind, lr=1e-2, warmup_steps=3), kl=kl, lr=1e-2, steps=10)
    start = weights_of(step.learner.policy)
    critic = step.learner.critic or step.learner.value_head
    before, found = weights_of(critic), []
    for trained_steps in range(3):
        step.learner.begin_step(trained_steps)
        found.append(step(some_rollouts(step, PROMPTS * 4)))
        assert weights_of(step.learner.policy).equal(start)
    assert not weights_of(critic).equal(before)
    assert found[-1].value_loss < found[0].value_loss
    assert all(figures.critic_grad_norm > 0 for figures in found)
    assert step.kl.coef == 0.1, "the policy stood still: its KL says nothing about the coefficient"
    step.learner.begin_step(3)
    step(some_rollouts(step))
    assert not weights_of(step.learner.policy).equal(start)
    assert step.kl.coef != 0.1


def test_a_warm_up_without_critic_or_without_end_is_refused():
    def settings(critic, **ppo):
        return Settings.model_validate({"critic": {"warmup_steps": critic}, "ppo": ppo})

    with pytest.raises(SettingsError, match='estimator = "rloo" has no critic, so 0 is needed; 2 received'):
        check_warmup(settings(2, estimator="rloo", completions=2))
    with pytest.raises(SettingsError, match=r"fewer than ppo\.steps, 40, are needed; 40 received"):
        check_warmup(settings(40))
    check_warmup(settings(39))
    check_warmup(settings(0, estimator="rloo", completions=2))


def test_learning_rates_follow_their_schedule():
    def rates(trained_steps, **settings):
        step = tiny_step(lr=1e-3, steps=8, critic=CriticSettings(lr=4e-3), **settings)
        step.learner.begin_step(trained_steps)
        return [step.learner.optimizers[name].param_groups[0]["lr"] for name in ("policy", "critic")]

    assert rates(6) == [1e-3, 4e-3]
    assert rates(6, lr_schedule="linear") == pytest.approx([0.25e-3, 1e-3])


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_checkpointed_activations_change_the_memory_and_not_a_bit(kind):
    ends, forwards = {}, {}
    for checkpointing in (False, True):
        step = tiny_step(gradient_checkpointing=checkpointing, critic=CriticSettings(kind=kind, lr=1e-3))
        rollouts, count = some_rollouts(step), []
        step.learner.policy.base_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_, c=count: c.append(1))
        figures = step(rollouts)
        assert figures.first_ratio_error == 0.0
        ends[checkpointing], forwards[checkpointing] = weights_of(step.learner.policy), len(count)
    assert ends[True].equal(ends[False])
    # One pass before the step and two updates, of which each computes its layers twice.
    assert forwards == {False: 3, True: 5}


def test_checkpointing_leaves_dropout_off_and_needs_layers_that_can():
    policy = tiny_lm("gpt2")
    checkpoint_activations(policy)
    assert not any(module.training for module in policy.modules() if isinstance(module, torch.nn.Dropout))
    with pytest.raises(ModelError, match="Linear: its layers cannot be checkpointed"):
        checkpoint_activations(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_either_attention_computes_the_same(architecture):
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    logits = {}
    for implementation in (None, "sdpa", "eager"):
        policy = tiny_lm(architecture)
        attend_with(torch.nn.ModuleList([policy]), implementation)
        assert policy.base_model.config._attn_implementation == (implementation or "sdpa")
        logits[implementation] = policy(input_ids=ids).logits
    assert logits[None].equal(logits["sdpa"])
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=1e-5)


def test_an_attention_that_is_not_there():
    with pytest.raises(ModelError, match="LlamaForCausalLM: has no attention 'nonsense'"):
        attend_with(tiny_lm(), "nonsense")


def gradient(step, rollouts):
    """Of one minibatch, as one row; advantages are random."""
    experience = gather(rollouts)
    (minibatch,) = minibatches(experience, 1, 10_000, torch.arange(experience.sequences))
    before = step.learner.assess(experience, minibatch)
    learner, parameters = step.learner, list(step.learner.policy.parameters())
    learner.optimizers = {}
    learner._clip_and_step = lambda name, optimizer: 0.0
    advantages = torch.randn(len(experience.token_ids), generator=torch.Generator().manual_seed(2))
    from rlhf.ppo.learner import Targets

    targets = Targets(before.logprobs, before.ref_logprobs, before.values, advantages, before.values)
    learner._accumulate(experience, minibatch[0], targets, int(experience.response_mask.sum()))
    return before, torch.cat([p.grad.flatten() for p in parameters])


def test_bfloat16_computes_in_it_and_keeps_its_weights_in_float32():
    exact = tiny_step()
    rollouts = some_rollouts(exact)
    rounded = tiny_step(dtype="bfloat16")
    assert {p.dtype for p in rounded.learner.policy.parameters()} == {torch.float32}
    (one, true), (other, found) = gradient(exact, rollouts), gradient(rounded, rollouts)
    # A logit of about 10 is off by 2^-8 of itself after each of two layers' roundings.
    error = (one.logprobs - other.logprobs).abs().max().item()
    assert 1e-6 < error < 0.3, error
    assert found.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(found, true, dim=0).item()
    assert 0.98 < cosine < 1 - 1e-9, cosine


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_step_in_bfloat16_begins_at_a_ratio_of_exactly_one(kind):
    step = tiny_step(dtype="bfloat16", critic=CriticSettings(kind=kind, lr=1e-3), minibatches=2, micro_batch_tokens=20)
    start = weights_of(step.learner.policy)
    figures = step(some_rollouts(step))
    assert figures.first_ratio_error == 0.0
    moved = (weights_of(step.learner.policy) - start).abs().max().item()
    assert 1e-4 < moved < 1e-1


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float16 gradients underflow"):
        PpoSettings(dtype="float16")


def test_two_runs_of_one_seed_end_with_the_same_bits():
    ends = []
    for _ in range(2):
        step = tiny_step(minibatches=2, micro_batch_tokens=40)
        reference = copy.deepcopy(step.learner.policy)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            step(sampled_rollouts(step.learner.policy, reference, PROMPTS, len, new_tokens=6, generator=generator))
        ends.append(weights_of(step.learner.policy))
    assert ends[0].equal(ends[1])
