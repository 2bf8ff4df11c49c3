"""The details on which implementations of PPO for language models differ, one test each, numbered as in
docs/ppo-details.md, which says what others do and why the default here is what it is.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.models.causal import load_causal_lm
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel, ended
from rlhf.ops import gae, kl_penalty, policy_loss
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import Finished, GenerationRequest
from rlhf.policy.settings import SamplingSettings
from rlhf.ppo.experience import gather, minibatches
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Learner
from rlhf.ppo.ledger import Issue
from rlhf.ppo.losses import value_loss
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.rewards import shaped_scores, whiten
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings
from rlhf.ppo.setup import build_step
from rlhf.ppo.source import TaskMaker
from rlhf.preference.plackett_luce import plackett_luce
from rlhf.preference.settings import RewardModelSettings
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.settings.run import Settings
from rlhf.wire.records import FinishReason, Sampling, Stopping, WeightVersion
from support.parity import EOS, PAD, new_case, our_scores, our_step, response_mask, sequences
from support.rollouts import rollout, scored
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer

VERSION = WeightVersion("", 0, 0, "0" * 64)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return new_case(tmp_path_factory.mktemp("case"), ended_early=True)


@pytest.fixture(scope="module")
def step(case):
    return our_step(case)


def generate(model, prompt, *, seed=0, sampling=None, **stopping):
    engine = ContinuousEngine(model, tiny_tokenizer(), VERSION, Limits())
    request = GenerationRequest(
        0, np.array(prompt, np.int32), seed, sampling or Sampling(), Stopping(**{"max_new_tokens": 8, **stopping})
    )
    engine.submit([request])
    while True:
        for event in engine.step():
            if isinstance(event, Finished):
                return event


def defined_logprobs(model, ids, prompt_tokens, temperature):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, prompt_tokens - 1 : -1]
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(1, torch.tensor(ids[prompt_tokens:])[:, None])[:, 0]


# Sampling


def test_01_temperature_divides_logits_before_log_probs_in_policy_reference_and_trainer(case, step):
    model, prompt = tiny_lm(), [5, 6, 7]
    sampled = generate(model, prompt, sampling=Sampling(temperature=0.7))
    ids = [*prompt, *sampled.token_ids.tolist()]
    expected = defined_logprobs(model, ids, len(prompt), 0.7)
    torch.testing.assert_close(torch.tensor(sampled.logprobs), expected, atol=1e-5, rtol=0)
    reference = ReferenceModel(model, model_sha256="", tokenizer_sha256="").forward([Item(np.array(ids), 3, 0.7)])[0]
    torch.testing.assert_close(torch.tensor(reference), expected, atol=1e-5, rtol=0)
    for row in range(4):
        found = step.logprobs[row][response_mask(case)[row]]
        own = defined_logprobs(case.policy, sequences(case)[row], len(case.prompts[row]), case.temperature)
        torch.testing.assert_close(found, own, atol=1e-5, rtol=0)
    defaults = SamplingSettings()
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (1.0, 0, 1.0)


def test_02_padding_on_either_side_changes_nothing(case):
    """The trainer pads on the right, where causal attention needs no mask; left-padded rows with positions from the
    mask, as others have them, say the same."""
    whole = sequences(case)[:5]
    longest = max(map(len, whole))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in whole])
    mask = torch.arange(longest) >= longest - torch.tensor([len(row) for row in whole]).unsqueeze(1)
    positions = (mask.cumsum(1) - mask.long()).masked_fill(~mask, 0)
    with torch.no_grad():
        left = case.policy(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits
        right = case.policy(input_ids=pad(whole, PAD)[0]).logits
    for row, tokens in enumerate(whole):
        torch.testing.assert_close(left[row, -len(tokens) :], right[row, : len(tokens)], atol=1e-4, rtol=1e-4)


def test_03_a_fixed_response_length_can_be_asked_for():
    """Responses end with the end token unless min_new_tokens forbids it."""
    model = tiny_lm()
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] = 50 * model.get_output_embeddings().weight[EOS].sign()
    lengths = [len(generate(model, [5, seed + 6], seed=seed).token_ids) for seed in range(8)]
    assert min(lengths) < 8
    fixed = [len(generate(model, [5, seed + 6], seed=seed, min_new_tokens=8).token_ids) for seed in range(8)]
    assert fixed == [8] * 8
    assert SamplingSettings().min_new_tokens == 0


def test_04_a_sampled_pad_token_is_a_token_like_any_other():
    """Masks say what counts, not ids: a random policy may sample its pad token, and neither ends nor loses anything."""
    middle_pad = scored([5, 6, PAD, 8], 1, score=1.0)
    experience = gather([rollout(0, middle_pad)])
    assert experience.response_mask.tolist() == [False, True, True, True]
    assert experience.last_response_index.tolist() == [3]


def test_05_dropout_is_off_everywhere(tmp_path):
    """In policy and critic also where training mode is on; reference and reward model are never put into it."""
    folder = tiny_lm_folder(tmp_path / "model", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    config.update(dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.5))
    (folder / "config.json").write_text(json.dumps(config))
    RewardModel.new(folder).save(tmp_path / "reward", tiny_tokenizer())
    settings = Settings.model_validate({"ppo": {"model": folder}, "critic": {"model": tmp_path / "reward"}})
    learner = build_step(settings, tiny_tokenizer()).learner
    ids = torch.tensor([[5, 6, 7, 8]])
    for module, call in (
        (learner.policy, lambda model: model(input_ids=ids).logits),
        (learner.critic, lambda model: model(ids, torch.ones_like(ids, dtype=torch.bool))),
    ):
        assert any(isinstance(part, torch.nn.Dropout) for part in module.modules())
        module.train()
        assert call(module).equal(call(module))
    served = load_causal_lm(folder), RewardModel.load(tmp_path / "reward")
    assert not any(part.training for model in served for part in model.modules() if isinstance(part, torch.nn.Dropout))
    served[0].train()
    assert not served[0](input_ids=ids).logits.equal(served[0](input_ids=ids).logits), (
        "or there would be none to be off"
    )


def test_06_the_first_minibatchs_ratio_is_exactly_one(case):
    assert our_step(case, minibatches=2, micro_batch_tokens=40).figures["first_ratio_error"] == 0.0
    assert PpoSettings().old_logprobs == "recompute"


# Responses


def test_07_a_response_ends_at_its_end_token_and_nothing_follows(case, step):
    model, prompt = tiny_lm(), [5, 6, 7]
    free = generate(model, prompt, ignore_eos=True).token_ids.tolist()
    stopped = generate(model, prompt, stop_token_ids=(free[3],)).token_ids.tolist()
    assert stopped == free[: free.index(free[3]) + 1]
    outside = ~response_mask(case)
    assert outside.any()
    assert (step.advantages[outside] == 0).all()


def test_08_the_reward_model_reads_the_tokens_that_the_policy_is_trained_on():
    """Since nothing follows an end token, there are no truncated and untruncated versions of a response: the reward
    model reads prompt and response up to one end token, which it is given where the response was cut off."""
    assert ended([5, 6, 7, EOS], EOS) == [5, 6, 7, EOS]
    assert ended([5, 6, 7], EOS) == [5, 6, 7, EOS]


def test_09_a_missing_end_token_replaces_the_score_or_is_subtracted_from_it():
    experience = gather(
        [
            rollout(0, scored([1, 2, 3], 1, score=0.5)),
            rollout(1, scored([1, 2, 3], 1, score=0.5, finish_reason=FinishReason.LENGTH)),
        ]
    )
    assert shaped_scores(experience, PpoSettings()).tolist() == [0.5, 0.5]
    assert shaped_scores(experience, PpoSettings(missing_eos_penalty=1.0)).tolist() == [0.5, -0.5]
    replacing = PpoSettings(missing_eos_penalty=1.0, missing_eos="replace")
    assert shaped_scores(experience, replacing).tolist() == [0.5, -1.0]


def test_10_the_reward_is_read_at_the_last_token_by_the_mask(case):
    """And not by looking for the pad token, which may be the end token or stand in the text."""
    whole = [[5, 6, EOS], [7, EOS, 8, 9, EOS], [PAD, 10]]
    with torch.no_grad():
        alone = torch.cat([case.reward(*pad([ids], 0)) for ids in whole])
        for filler in (PAD, EOS, 11):
            torch.testing.assert_close(case.reward(*pad(whole, filler)), alone, atol=1e-5, rtol=1e-5)


# Rewards


def test_11_rewards_are_minus_beta_k1_with_the_score_at_the_last_sampled_token(case, step):
    mask = response_mask(case)
    expected = torch.where(mask, -case.kl_coef * (step.logprobs - step.ref_logprobs), 0.0)
    last = mask.sum(1) - 1
    expected[torch.arange(len(last)), last] += our_scores(case)
    torch.testing.assert_close(step.rewards, expected, atol=1e-6, rtol=0)
    assert KlSettings().estimator == "k1"


def test_12_the_adaptive_coefficient_follows_nats_per_sequence(case, step):
    controller = KlController(KlSettings(coef=0.15, adaptive=True))
    assert (controller.settings.target, controller.settings.horizon) == (6.0, 10_000.0)
    controller.update(6.0 * 1.1, 512)
    assert controller.coef == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000))
    controller.update(1e6, 512)
    assert controller.coef == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000) * (1 + 0.2 * 512 / 10_000))
    mask = response_mask(case)
    per_sequence = torch.where(mask, step.logprobs - step.ref_logprobs, 0.0).sum(1).mean().item()
    assert step.kl == pytest.approx(per_sequence, abs=1e-4)
    assert KlSettings().adaptive is False


def test_13_whitened_rewards_keep_their_mean_and_have_the_biased_variance():
    rewards, mask = torch.tensor([3.0, 1.0, 5.0, 99.0]), torch.tensor([True, True, True, False])
    counted = rewards[:3]
    variance = ((counted - 3.0) ** 2).mean()
    expected = (counted - 3.0) / torch.sqrt(variance + 1e-8) + 3.0
    torch.testing.assert_close(whiten(rewards, mask, keep_mean=True)[:3], expected)
    assert PpoSettings().whiten_rewards is False


def test_14_reward_models_are_normalised_on_the_reference_policys_samples(case):
    model = copy.deepcopy(case.reward)
    ids, mask = pad(sequences(case), 0)
    with torch.no_grad():
        model.normalise(model.raw_scores(ids, mask))
        scores = model(ids, mask)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-5)


# Advantages and losses


def test_15_gae_with_no_value_after_the_last_token_and_returns_before_whitening(case, step):
    mask = response_mask(case)
    advantages = torch.zeros(mask.shape)
    for row in range(len(mask)):
        following = 0.0
        for t in reversed(range(int(mask[row].sum()))):
            has_next = t + 1 < int(mask[row].sum())
            next_value = step.values[row, t + 1] if has_next else 0.0
            delta = step.rewards[row, t] + case.gamma * next_value - step.values[row, t]
            advantages[row, t] = following = delta + case.gamma * case.gae_lambda * following
    torch.testing.assert_close(gae(step.rewards, step.values, mask, 0.99, 0.95), advantages, atol=1e-5, rtol=0)
    torch.testing.assert_close(step.returns, torch.where(mask, advantages + step.values, 0.0), atol=1e-4, rtol=0)
    assert (PpoSettings().gamma, PpoSettings().gae_lambda) == (1.0, 0.95)


def test_16_advantages_are_whitened_once_over_the_batchs_sampled_tokens(case, step):
    for minibatches_of_a_pass in (1, 4):
        found = our_step(case, minibatches=minibatches_of_a_pass, epochs=1)
        counted = found.advantages[response_mask(case)]
        assert counted.mean().item() == pytest.approx(0.0, abs=1e-5)
        assert counted.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
        torch.testing.assert_close(found.advantages, step.advantages, atol=1e-5, rtol=0)
    assert PpoSettings().whitens_advantages


def test_17_the_policys_loss_is_clipped_and_a_mean_over_sampled_tokens(case):
    ratio, advantage = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    total, _ = policy_loss(ratio.log(), torch.zeros(4), advantage, torch.ones(4, dtype=torch.bool), 0.2, 0.2)
    assert total.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8, abs=1e-6)
    # Micro-batches of other sizes weigh each token alike.
    one, many = our_step(case), our_step(case, micro_batch_tokens=40)
    assert many.policy_losses == pytest.approx(one.policy_losses, abs=1e-5)
    defaults = PpoSettings()
    assert (defaults.clip_range, defaults.epochs, defaults.minibatches) == (0.2, 4, 1)


def test_18_the_value_loss_is_half_the_larger_of_clipped_and_unclipped():
    values, old, returns = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3), torch.tensor([2.0, 2.0, 2.0])
    clipped = old + (values - old).clamp(-0.2, 0.2)
    expected = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum()
    assert value_loss(values, old, returns, 0.2).item() == pytest.approx(expected.item())
    assert (PpoSettings().value_clip_range, CriticSettings().coef) == (0.2, 0.1)


def test_19_no_entropy_bonus_and_entropy_over_sampled_tokens_alone(case, step):
    assert PpoSettings().entropy_coef == 0.0
    total, tokens = 0.0, 0
    for ids, prompt in zip(sequences(case), case.prompts, strict=True):
        with torch.no_grad():
            logits = case.policy(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] / case.temperature
        total += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        tokens += len(ids) - len(prompt)
    assert step.figures["entropy"] == pytest.approx(total / tokens, abs=1e-4)


def test_20_reward_heads_start_at_1_over_sqrt_d_plus_1_and_the_critic_from_the_reward_model(tmp_path):
    shared = our_step(new_case(tmp_path / "case", epochs=1))
    assert shared.values.abs().max() > 0, "a separate critic starts from the reward model"
    assert CriticSettings().init_from == "reward-model"
    model = RewardModel.new(tiny_lm_folder(tmp_path / "wide"), seed=0)
    assert model.head.bias is None
    spread = [
        RewardModel.new(tmp_path / "wide", seed=seed).head.weight.detach().std(correction=0).item()
        for seed in range(20)
    ]
    assert np.mean(spread) == pytest.approx(1 / math.sqrt(model.head.in_features + 1), rel=0.1)


def test_20_a_value_head_on_the_policys_trunk_starts_at_zero():
    learner = Learner(
        tiny_lm(), None, PpoSettings(), CriticSettings(kind="shared"), KlSettings(), temperature=1.0, pad_id=PAD
    )
    experience = gather([rollout(0, scored([5, 6, 7, 8], 2))])
    values = learner.assess(experience, next(minibatches(experience, 1, 100, torch.arange(1)))).values
    assert (values == 0).all()


def test_21_adams_epsilon_is_1e_5_inside_pytorchs_form(case):
    one = our_step(case, epochs=1)
    change = torch.cat([one.first_change[name].flatten() for name in one.gradients[0]])
    gradient = torch.cat([g.flatten() for g in one.gradients[0].values()])
    # After bias correction the first step's moments are the gradient and its square.
    torch.testing.assert_close(change, -case.lr * gradient / (gradient.abs() + 1e-5), atol=2e-6, rtol=1e-3)
    assert (PpoSettings().adam_epsilon, PpoSettings().lr_schedule) == (1e-5, "constant")


def test_22_reward_models_learn_from_a_whole_ranking_in_one_pass():
    """As from a choice of the best of all, then of the best of those left; of two, that is -log σ of the difference."""
    scores = torch.tensor([2.0, 0.5, 1.0])
    expected = -torch.log_softmax(scores, 0)[0] - torch.nn.functional.logsigmoid(scores[2] - scores[1])
    assert plackett_luce(scores, (1, 3, 2)).item() == pytest.approx(expected.item())
    pair = -torch.nn.functional.logsigmoid(scores[0] - scores[1])
    assert plackett_luce(scores[:2], (1, 2)).item() == pytest.approx(pair.item())
    defaults = RewardModelSettings()
    assert (defaults.loss, defaults.epochs, defaults.prompts_per_batch) == ("plackett-luce", 1, 8)
    assert (defaults.lr, defaults.schedule) == (1e-3, "cosine")


def test_23_a_batch_is_prompts_times_completions():
    assert (PpoSettings().batch_prompts, PpoSettings().completions) == (64, 1)
    experience = gather([rollout(row, *[scored([1, 2, 3], 1)] * 3) for row in range(2)])
    assert experience.sequences == 6
    parts = list(minibatches(experience, 2, 10**6, torch.arange(6)))
    assert [sum(len(micro.place_mask) for micro in part) for part in parts] == [3, 3]


def test_24_seeds_belong_to_prompts_and_not_to_workers():
    """Others add 100003 per rank. A prompt's seed here is a hash of the run's seed, the prompt and the attempt, so that
    it does not matter which worker or replica answers."""
    prompts = [EncodedPrompt(str(row), {}, np.array([row + 5], np.int32)) for row in range(5)]

    def task(index, attempt=0, seed=0):
        maker = TaskMaker(
            prompts, run_id="r", seed=seed, sampling=Sampling(), stopping=Stopping(8), tokenizer_sha256="t"
        )
        return maker.task(Issue(index, attempt), "id", VERSION)

    assert task(3) == task(3)
    seeds = {task(index, attempt, seed).sampling.seed for index in range(10) for attempt in (0, 1) for seed in (0, 1)}
    assert len(seeds) == 40
    assert sorted(task(index).token_ids[0] for index in range(5)) == [5, 6, 7, 8, 9], "each pass has every prompt once"


def test_25_k1_as_a_loss_has_no_gradient_and_k2_has_the_kls():
    """By enumeration over a vocabulary of five: E_p[∇k1] = 0, E_p[∇k2] = ∇KL(p ‖ q), E_p[∇k3] = ∇KL(q ‖ p)."""
    z = torch.tensor([0.5, -1.0, 0.3, 1.2, 0.0], dtype=torch.float64, requires_grad=True)
    q = torch.log_softmax(torch.tensor([0.0, 0.4, -0.7, 0.9, 0.2], dtype=torch.float64), -1)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp().detach()

    def gradient(value):
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    def expected(estimator):
        return gradient((p * kl_penalty(log_p, q, estimator)).sum())

    forward, backward = (log_p.exp() * (log_p - q)).sum(), (q.exp() * (q - log_p)).sum()
    torch.testing.assert_close(expected("k1"), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected("k2"), gradient(forward))
    torch.testing.assert_close(expected("k3"), gradient(backward))
    assert not torch.allclose(expected("k3"), gradient(forward), rtol=0.05)
    assert (KlSettings().loss_coef, KlSettings().loss_estimator) == (0.0, "k3")


def test_the_documentation_has_a_line_for_every_detail():
    text = (Path(__file__).parents[2] / "docs" / "ppo-details.md").read_text()
    names = [name for name in globals() if name.startswith("test_") and name[5:7].isdigit()]
    assert {name[5:7] for name in names} == {f"{number:02}" for number in range(1, 26)}
    assert [name for name in names if name not in text] == []
