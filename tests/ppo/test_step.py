"""The optimisation step: what must be exact, what padding and cutting must not change, and that it learns."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.errors import StageFailed
from rlhf.models.causal import disable_dropout
from rlhf.models.reward import RewardModel
from rlhf.ops import kl_penalty, policy_loss
from rlhf.ppo.experience import gather, minibatches
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Assessment, Learner, Targets
from rlhf.ppo.losses import value_loss
from rlhf.ppo.rewards import shaped_scores, token_kl, token_rewards, whiten
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings
from rlhf.ppo.step import PpoStep
from rlhf.wire.records import FinishReason
from support.rollouts import rollout, sampled_rollouts, scored
from support.tiny import tiny_lm, tiny_reward_folder, tiny_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9]]


def critic_over(policy):
    trunk = copy.deepcopy(policy.base_model)

    class Critic(nn.Module):
        """Any scalar model will do; the reward model's own tests are elsewhere."""

        mean, std = 0.0, 1.0

        def __init__(self):
            super().__init__()
            self.trunk = trunk
            self.head = nn.Linear(16, 1, bias=False)
            nn.init.zeros_(self.head.weight)

        def token_values(self, input_ids, attention_mask):
            return self.head(self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state).squeeze(-1)

    return Critic()


def new_step(*, kl=None, critic="separate", temperature=1.0, reference=None, **settings):
    policy = tiny_lm()
    disable_dropout(policy)
    learner = Learner(
        policy,
        critic_over(policy) if critic == "separate" else None,
        PpoSettings(**{"epochs": 2, "lr": 1e-3, **settings}),
        CriticSettings(kind=critic, lr=1e-3),
        kl or KlSettings(),
        reference=reference,
        temperature=temperature,
        pad_id=tiny_tokenizer().pad_token_id,
    )
    return PpoStep(learner, KlController(kl or KlSettings()), torch.Generator().manual_seed(0))


def some_rollouts(step, *, temperature=1.0, reward=lambda response: float(len(set(response)))):
    generator = torch.Generator().manual_seed(1)
    policy = step.learner.policy
    return sampled_rollouts(policy, policy, PROMPTS, reward, new_tokens=6, temperature=temperature, generator=generator)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_ratio_is_exactly_one_and_kl_zero_on_fresh_rollouts(critic, temperature):
    step = new_step(critic=critic, temperature=temperature, minibatches=2, micro_batch_tokens=20)
    figures = step(some_rollouts(step, temperature=temperature))
    assert figures.first_ratio_error == 0.0
    assert figures.service_logprob_error < 1e-5
    assert abs(figures.kl_mean) < 1e-5
    assert figures.entropy > 0


def test_forgetting_the_temperature_shows_as_a_logprob_error():
    step = new_step(temperature=1.0)
    figures = step(some_rollouts(step, temperature=0.7))
    assert figures.service_logprob_error > 0.01


def test_padding_and_micro_batches_do_not_change_what_the_weights_say():
    step = new_step()
    experience = gather(some_rollouts(step))
    order = torch.arange(experience.sequences)
    alone = [micro for part in minibatches(experience, 4, 1, order) for micro in part]
    together = next(minibatches(experience, 1, 10_000, order))
    assert (len(alone), len(together)) == (4, 1)
    one, other = step.learner.assess(experience, alone), step.learner.assess(experience, together)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.entropy, other.entropy, atol=1e-5, rtol=0)
    assert (one.logprobs[~experience.response_mask] == 0).all()


def test_micro_batches_add_up_to_the_minibatch():
    """Two steps that differ only in how a minibatch is cut end with the same weights."""
    ends = []
    for micro_batch_tokens in (10_000, 12):
        torch.manual_seed(0)
        step = new_step(micro_batch_tokens=micro_batch_tokens, epochs=1)
        step(some_rollouts(step))
        ends.append(torch.cat([p.detach().flatten() for p in step.learner.policy.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny_lm().parameters()])
    moved = (ends[0] - start).abs().max()
    assert moved > 1e-4
    assert (ends[0] - ends[1]).abs().max() < 0.02 * moved


def test_the_gradient_is_that_of_the_plain_formula():
    """One epoch of one minibatch against PPO written out with loops over sequences."""
    step = new_step(epochs=1, whiten_advantages=False, max_grad_norm=1e9)
    rollouts = some_rollouts(step)
    policy = copy.deepcopy(step.learner.policy)
    experience = gather(rollouts)
    order = torch.arange(experience.sequences)
    before = step.learner.assess(experience, next(minibatches(experience, 1, 10_000, order)))
    advantages = torch.randn(len(experience.token_ids), generator=torch.Generator().manual_seed(2))
    targets = Targets(before.logprobs - 0.3, before.ref_logprobs, before.values, advantages, before.values)

    total, tokens = torch.zeros(()), 0
    for row in range(experience.sequences):
        start, end = experience.cu_seqlens[row : row + 2].tolist()
        ids = experience.token_ids[start:end]
        log_p = torch.log_softmax(policy(input_ids=ids[None]).logits[0], -1)
        for t in range(1, len(ids)):
            if experience.response_mask[start + t]:
                ratio = (log_p[t - 1, ids[t]] - targets.old_logprobs[start + t]).exp()
                a = advantages[start + t]
                total = total + torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
                tokens += 1
    (total / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])

    figures = step.learner.improve(experience, next(minibatches(experience, 1, 10_000, order)), targets)
    assert figures.policy_loss == pytest.approx((total / tokens).item(), rel=1e-4)
    assert figures.policy_grad_norm == pytest.approx(expected.norm().item(), rel=1e-3)


def test_ppo_learns_to_prefer_a_token():
    step = new_step(epochs=4, lr=3e-3, kl=KlSettings(coef=0.01))
    wanted = set(range(0, 280, 2))
    reference = copy.deepcopy(step.learner.policy)
    generator = torch.Generator().manual_seed(3)

    def share_of_even_tokens(response):
        return sum(token in wanted for token in response) / len(response)

    scores = []
    for _ in range(15):
        rollouts = sampled_rollouts(
            step.learner.policy, reference, PROMPTS * 16, share_of_even_tokens, new_tokens=6, generator=generator
        )
        scores.append(step(rollouts).score_mean)
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15


def test_missing_eos_is_penalised_and_scores_are_clipped():
    experience = gather(
        [
            rollout(0, scored([1, 2, 3], 1, score=2.0)),
            rollout(1, scored([1, 2, 3], 1, score=2.0, finish_reason=FinishReason.LENGTH)),
        ]
    )
    subtract = PpoSettings(missing_eos_penalty=1.0)
    assert shaped_scores(experience, subtract).tolist() == [2.0, 1.0]
    assert shaped_scores(experience, replace_setting(subtract, missing_eos="replace")).tolist() == [2.0, -1.0]
    assert shaped_scores(experience, replace_setting(subtract, score_clip=1.5)).tolist() == [1.5, 1.0]


def replace_setting(settings, **changes):
    return settings.model_copy(update=changes)


def before_of(experience):
    """An assessment that knows nothing but the reference's log-probs."""
    nothing = torch.zeros(len(experience.token_ids))
    return Assessment(nothing, experience.ref_logprobs, None, nothing, nothing)


def test_rewards_are_the_kl_penalty_with_the_score_on_the_last_response_token():
    completion = scored([1, 2, 3, 4], 2, score=5.0, logprobs=[-1.0, -2.0], ref_logprobs=[-1.5, -1.0])
    experience = gather([rollout(0, completion), rollout(1, scored([1, 2], 1, score=-1.0))])
    kl = token_kl(before_of(experience), experience.service_logprobs, experience.response_mask, "k1")
    rewards = token_rewards(experience, experience.scores, kl, 0.1)
    assert rewards.tolist() == pytest.approx([0.0, 0.0, -0.05, 5.1, 0.0, -1.0])
    assert kl.tolist() == pytest.approx([0.0, 0.0, 0.5, -1.0, 0.0, 0.0])


def test_token_rewards_of_the_service_are_added():
    completion = replace(
        scored([1, 2, 3], 1, score=1.0), token_rewards=torch.tensor([9.0, 0.25, 0.5], dtype=torch.float32).numpy()
    )
    experience = gather([rollout(0, completion)])
    rewards = token_rewards(experience, experience.scores, torch.zeros(3), 0.0)
    assert rewards.tolist() == [0.0, 0.25, 1.5], "what stands on the prompt does not count"


def test_whitening_uses_the_biased_variance_of_what_counts():
    values = torch.tensor([1.0, 2.0, 3.0, 100.0])
    mask = torch.tensor([True, True, True, False])
    whitened = whiten(values, mask)
    assert whitened.tolist() == pytest.approx([-1.224745, 0.0, 1.224745, 100.0], abs=1e-5)
    assert whiten(values, mask, keep_mean=True).tolist() == pytest.approx([0.775255, 2.0, 3.224745, 100.0], abs=1e-5)


def test_clipped_losses_by_hand():
    old, mask = torch.zeros(1, 4), torch.tensor([[True, True, True, False]])
    logprobs = torch.tensor([[0.5, -0.5, 0.0, float("nan")]])
    advantages = torch.tensor([[1.0, 1.0, -2.0, float("nan")]])
    total, clipped = policy_loss(logprobs, old, advantages, mask, 0.2, 0.2)
    assert total.item() == pytest.approx(-1.2 - 0.60653 + 2.0, abs=1e-4)
    assert clipped.tolist() == [[True, False, False, False]]
    loss = value_loss(torch.tensor([1.0, 0.1, 0.0]), torch.zeros(3), torch.ones(3), 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 0.9**2 + 1.0), abs=1e-5)


def test_adaptive_kl_follows_ziegler():
    controller = KlController(KlSettings(coef=0.1, adaptive=True, target=6.0, horizon=10_000))
    controller.update(12.0, 500)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 500 / 10_000)), "the error is clipped at 0.2"
    controller.update(6.0, 500)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 500 / 10_000))
    fixed = KlController(KlSettings(coef=0.1))
    fixed.update(100.0, 500)
    assert fixed.coef == 0.1


def test_k1_is_what_the_reward_subtracts_by_default():
    assert KlSettings().estimator == "k1"
    assert kl_penalty(torch.tensor(-1.0), torch.tensor(-3.0), "k1").item() == 2.0


def test_a_reward_model_serves_as_critic(tmp_path):
    """Its normalisation applies, so that values start on the scale of the scores."""
    policy = tiny_lm()
    critic = RewardModel.load(tiny_reward_folder(tmp_path / "reward", mean=0.25, std=0.5))
    learner = Learner(policy, critic, PpoSettings(), CriticSettings(), KlSettings(), temperature=1.0, pad_id=0)
    experience = gather([rollout(0, scored([5, 6, 7, 8], 2))])
    values = learner.assess(experience, next(minibatches(experience, 1, 100, torch.arange(1)))).values
    # The state before the last token is the first three; the reward model scores just those.
    score = critic(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    assert values[3].item() == pytest.approx(score.item(), abs=1e-5)


def test_what_lies_outside_the_mask_reaches_no_gradient():
    logprobs = torch.tensor([-1.0, float("nan")], requires_grad=True)
    mask, nan = torch.tensor([True, False]), torch.tensor([-1.0, float("nan")])
    policy_loss(logprobs, nan, nan, mask, 0.2, 0.2)[0].backward()
    assert logprobs.grad.tolist() == [1.0, 0.0]


def test_a_score_that_is_not_finite_ends_the_step_before_the_weights_change():
    step = new_step()
    before = [p.detach().clone() for p in step.learner.policy.parameters()]
    with pytest.raises(StageFailed, match="policy's gradient is nan"):
        step(some_rollouts(step, reward=lambda response: float("nan")))
    assert all(a.equal(b) for a, b in zip(before, step.learner.policy.parameters(), strict=True))
