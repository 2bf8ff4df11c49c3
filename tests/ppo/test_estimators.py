"""Advantage estimators: each against its formula written out, and the settings that go with them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pydantic import ValidationError

from rlhf.ppo.estimators import ESTIMATORS
from rlhf.ppo.experience import gather, minibatches
from rlhf.ppo.learner import Targets
from rlhf.ppo.settings import PpoSettings
from support.rollouts import rollout, sampled_rollouts, scored
from support.steps import ALONE, tiny_step, weights_of

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9]]


def grouped(sizes=(3, 2, 4), seed=0):
    """Completions of several prompts, of different lengths; rewards and values of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for index, size in enumerate(sizes):
        lengths = torch.randint(1, 6, (size,), generator=generator).tolist()
        rollouts.append(rollout(index, *(scored([1] * (2 + n), 2) for n in lengths)))
    experience = gather(rollouts)
    mask = experience.response_mask
    rewards, values = (
        torch.where(mask, torch.randn(len(mask), generator=generator), torch.zeros(())) for _ in range(2)
    )
    return experience, rewards, values


def settings_of(name, **changes):
    return PpoSettings(estimator=name, **{**ALONE[name], **changes})


def per_sequence(experience, values):
    """One list for each sequence, of its sampled tokens."""
    starts, ends = experience.cu_seqlens[:-1].tolist(), experience.cu_seqlens[1:].tolist()
    return [values[a:b][experience.response_mask[a:b]].tolist() for a, b in zip(starts, ends, strict=True)]


def as_flat(experience, rows):
    flat = torch.zeros(len(experience.token_ids))
    flat[experience.response_mask] = torch.tensor([x for row in rows for x in row])
    return flat


def by_definition(name, experience, rewards, values, settings):
    """With loops over sequences and tokens; [N]."""
    r, v = per_sequence(experience, rewards), per_sequence(experience, values)
    gamma, lam = settings.gamma, settings.gae_lambda
    groups = experience.groups.tolist()
    rows = []
    if name in ("gae", "a2c"):
        lam = lam if name == "gae" else 1.0
        for rs, vs in zip(r, v, strict=True):
            delta = [x + gamma * (vs[t + 1] if t + 1 < len(vs) else 0.0) - vs[t] for t, x in enumerate(rs)]
            rows.append([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(rs))) for t in range(len(rs))])
    elif name == "reinforce++":
        rows = [[sum(gamma ** (k - t) * rs[k] for k in range(t, len(rs))) for t in range(len(rs))] for rs in r]
        mean = sum(map(sum, rows)) / sum(map(len, rows))
        rows = [[x - mean for x in row] for row in rows]
    else:
        total = [sum(rs) for rs in r]
        for i, rs in enumerate(r):
            peers = [total[j] for j in range(len(r)) if groups[j] == groups[i]]
            if name == "rloo":
                advantage = total[i] - (sum(peers) - total[i]) / (len(peers) - 1)
            else:
                mean = sum(peers) / len(peers)
                std = math.sqrt(sum((x - mean) ** 2 for x in peers) / (len(peers) - 1))
                advantage = (total[i] - mean) / (std + 1e-4 if settings.grpo_std else 1.0)
            rows.append([advantage] * len(rs))
    return as_flat(experience, rows)


@pytest.mark.parametrize(
    "settings",
    [
        settings_of("gae", gamma=0.9, gae_lambda=0.7),
        settings_of("a2c", gamma=0.9, gae_lambda=0.7),
        settings_of("rloo"),
        settings_of("grpo"),
        settings_of("grpo", grpo_std=False),
        settings_of("reinforce++", gamma=0.9),
    ],
    ids=["gae", "a2c", "rloo", "grpo", "grpo-undivided", "reinforce++"],
)
def test_an_estimator_is_its_formula(settings):
    for seed in range(3):
        experience, rewards, values = grouped(seed=seed)
        estimator = ESTIMATORS[settings.estimator]
        found = estimator(rewards, values, experience, settings)
        expected = by_definition(settings.estimator, experience, rewards, values, settings)
        torch.testing.assert_close(found.advantages, expected, atol=1e-4, rtol=1e-4)
        assert found.advantages.dtype == torch.float32
        assert (found.advantages[~experience.response_mask] == 0).all()
        if estimator.needs_critic:
            torch.testing.assert_close(found.returns, expected + values, atol=1e-4, rtol=1e-4)
        else:
            assert found.returns is None


def of_scores(*groups):
    """Rewards that are these scores, on the last token of completions of two."""
    experience = gather([rollout(i, *(scored([1, 2, 3], 1) for _ in scores)) for i, scores in enumerate(groups)])
    rewards = torch.zeros(len(experience.token_ids))
    rewards[experience.last_response_index] = torch.tensor([float(x) for scores in groups for x in scores])
    return experience, rewards


def test_groups_are_the_prompts():
    assert grouped((3, 2, 4))[0].groups.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_leaving_one_out_by_hand():
    experience, rewards = of_scores([1, 2, 6], [5, 5])
    found = ESTIMATORS["rloo"](rewards, rewards, experience, settings_of("rloo")).advantages
    assert found[experience.last_response_index].tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0]
    assert found[:3].tolist() == [0.0, -3.0, -3.0], "nothing on the prompt, the same on each token of the response"


def test_a_group_by_hand():
    experience, rewards = of_scores([1, 2, 6], [5, 5])
    divided = ESTIMATORS["grpo"](rewards, rewards, experience, settings_of("grpo")).advantages
    last = experience.last_response_index
    assert divided[last].tolist() == pytest.approx([-0.75586, -0.37793, 1.13379, 0.0, 0.0], abs=1e-4)
    undivided = ESTIMATORS["grpo"](rewards, rewards, experience, settings_of("grpo", grpo_std=False)).advantages
    assert undivided[last].tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_completions_that_scored_alike_teach_exactly_nothing(name):
    experience, rewards = of_scores([0.1, 0.1, 0.1], [1e6 + 0.3] * 7)
    assert (ESTIMATORS[name](rewards, rewards, experience, settings_of(name)).advantages == 0).all()


def test_the_batch_by_hand():
    """A token is worth what comes after it, the KL of what was before it not included."""
    experience = gather([rollout(0, scored([1, 2, 3], 1)), rollout(1, scored([1, 2], 1))])
    rewards = torch.tensor([0.0, -0.5, 2.0, 0.0, 1.0])
    found = ESTIMATORS["reinforce++"](rewards, rewards, experience, settings_of("reinforce++")).advantages
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.0, -0.5])


def test_names_critics_and_clipping():
    assert set(ESTIMATORS) == set(ALONE)
    for name, estimator in ESTIMATORS.items():
        assert estimator.name == name
        assert estimator.needs_critic == settings_of(name).needs_critic == (name in ("gae", "a2c"))
        assert estimator.clips == (name != "a2c")
        assert settings_of(name).whitens_advantages == (name in ("gae", "reinforce++"))
        assert not settings_of(name, whiten_advantages=False).whitens_advantages
        assert settings_of(name, whiten_advantages=True).whitens_advantages


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"estimator": "rloo"}, 'estimator = "rloo" compares the completions of a prompt, .* at least 2; 1 received'),
        ({"estimator": "grpo", "completions": 1}, "completions must be at least 2; 1 received"),
        ({"estimator": "grpo", "completions": 2, "gamma": 0.9}, "nothing to discount: gamma must be 1; 0.9 received"),
        ({"estimator": "a2c"}, "one step on each batch, .*: epochs must be 1; 4 received"),
        ({"estimator": "a2c", "epochs": 1, "minibatches": 2}, "minibatches must be 1; 2 received"),
        ({"estimator": "a2c", "epochs": 1, "dual_clip": 3.0}, "does not clip, so dual_clip would do nothing"),
        (
            {"estimator": "a2c", "epochs": 1, "max_staleness": 1, "old_logprobs": "service"},
            "no ratio that would correct",
        ),
        ({"estimator": "ppo"}, "estimator"),
        ({"dual_clip": 1.1}, "dual_clip must be above 1 . the clip range, 1.2, .* 1.1 received"),
        ({"dual_clip": 1.3, "clip_range_high": 0.4}, "the clip range, 1.4"),
        ({"max_staleness": 1}, 'needs objective = "decoupled", or old_logprobs = "service"'),
        ({"objective": "decoupled", "old_logprobs": "service"}, "contradicts it"),
        ({"importance_cap": 0.5}, "importance_cap"),
        ({"whiten_rewards_mean": True}, "whiten_rewards, which is off"),
    ],
)
def test_combinations_without_sense_are_refused(given, sentence):
    with pytest.raises(ValidationError, match=sentence):
        PpoSettings(**given)


def sampled(step, prompts, completions, reward, seed=1, reference=None):
    """Rollouts of `completions` completions each, from the step's own policy."""
    policy = step.learner.policy
    many = [prompt for prompt in prompts for _ in range(completions)]
    generator = torch.Generator().manual_seed(seed)
    alone = sampled_rollouts(policy, reference or policy, many, reward, new_tokens=6, generator=generator)
    rows = [alone[i : i + completions] for i in range(0, len(alone), completions)]
    return [rollout(i, *(one.completions[0] for one in row)) for i, row in enumerate(rows)]


def share_of_even_tokens(response):
    return sum(token % 2 == 0 for token in response) / len(response)


@pytest.mark.parametrize("name", ALONE)
def test_a_step_with_each_estimator(name):
    step = tiny_step(estimator=name, **ALONE[name])
    figures = step(sampled(step, PROMPTS, 4, share_of_even_tokens))
    assert figures.first_ratio_error == 0.0
    assert figures.policy_grad_norm > 0
    has_critic = name in ("gae", "a2c")
    assert (figures.value_loss is None, figures.explained_variance is None) == (not has_critic, not has_critic)
    assert (figures.critic_grad_norm is None) == (not has_critic)
    assert (
        set(step.learner.optimizers) == set(step.learner.modules()) == {"policy", *(["critic"] if has_critic else [])}
    )


@pytest.mark.parametrize("name", ALONE)
def test_each_estimator_learns_to_prefer_a_token(name):
    from rlhf.ppo.settings import KlSettings

    options = {"epochs": 4, "lr": 3e-3, **ALONE[name]}
    if name == "a2c":
        options["lr"] = 1e-2
    step = tiny_step(estimator=name, kl=KlSettings(coef=0.01), **options)
    reference = copy.deepcopy(step.learner.policy)
    scores = [
        step(sampled(step, PROMPTS * 4, 4, share_of_even_tokens, seed, reference)).score_mean for seed in range(15)
    ]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15, scores


def test_a2c_is_minus_the_advantage_times_the_log_probability():
    """Its gradient, written out with loops; and that of PPO's first step is the same (Huang et al. 2022)."""
    a2c = tiny_step(estimator="a2c", epochs=1, max_grad_norm=1e9)
    rollouts = sampled(a2c, PROMPTS, 1, share_of_even_tokens)
    experience = gather(rollouts)
    (minibatch,) = minibatches(experience, 1, 10_000, torch.arange(experience.sequences))
    before = a2c.learner.assess(experience, minibatch)
    advantages = torch.randn(len(experience.token_ids), generator=torch.Generator().manual_seed(2))
    targets = Targets(before.logprobs, before.ref_logprobs, before.values, advantages, before.values)

    policy, total = copy.deepcopy(a2c.learner.policy), torch.zeros(())
    for start, end in zip(experience.cu_seqlens[:-1].tolist(), experience.cu_seqlens[1:].tolist(), strict=True):
        log_p = torch.log_softmax(policy(input_ids=experience.token_ids[None, start:end]).logits[0], -1)
        for t in range(1, end - start):
            if experience.response_mask[start + t]:
                total = total - advantages[start + t] * log_p[t - 1, experience.token_ids[start + t]]
    mean = total / experience.response_mask.sum()
    mean.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()

    ppo = tiny_step(epochs=1, max_grad_norm=1e9)
    figures = a2c.learner.improve(experience, minibatch, targets)
    assert figures.policy_loss == pytest.approx(mean.item(), rel=1e-4)
    assert figures.policy_grad_norm == pytest.approx(expected, rel=1e-3)
    assert figures.clip_fraction == 0.0
    first = ppo.learner.improve(experience, minibatch, targets)
    assert first.policy_grad_norm == pytest.approx(expected, rel=1e-3)
    assert first.policy_loss != pytest.approx(mean.item(), rel=1e-2), "only their gradients are equal"


def test_whitening_follows_the_estimator_and_leaves_returns_alone():
    for name, options in (("gae", {}), ("gae", {"whiten_advantages": False}), ("rloo", {})):
        step = tiny_step(estimator=name, **{**ALONE[name], **options})
        experience, rewards, values = grouped()
        found = step._estimate(experience, rewards, values)
        raw = ESTIMATORS[name](rewards, values, experience, step.settings)
        if name == "gae" and not options:
            counted = found.advantages[experience.response_mask]
            assert counted.mean().item() == pytest.approx(0, abs=1e-6)
            assert counted.var(correction=0).item() == pytest.approx(1, abs=1e-5)
            assert not found.advantages.equal(raw.advantages)
        else:
            assert found.advantages.equal(raw.advantages)
        assert (found.returns is None) if raw.returns is None else found.returns.equal(raw.returns)


def test_rewards_are_whitened_with_or_without_their_mean():
    experience, rewards, values = grouped()
    rewards = torch.where(experience.response_mask, rewards + 3.0, 0.0)
    means = {}
    for shift in (False, True):
        step = tiny_step(estimator="a2c", epochs=1, whiten_rewards=True, whiten_rewards_mean=shift)
        # A value of 0 and a discount of 0 leave a token's own reward as its advantage.
        settings = step.settings.model_copy(update={"gamma": 0.0})
        step.settings = settings
        counted = step._estimate(experience, rewards, torch.zeros_like(values)).advantages[experience.response_mask]
        assert counted.var(correction=0).item() == pytest.approx(1, abs=1e-4)
        means[shift] = counted.mean().item()
    assert means[True] == pytest.approx(0, abs=1e-5)
    assert means[False] == pytest.approx(rewards[experience.response_mask].mean().item(), abs=1e-4)


def test_the_reward_of_a_whole_completion_has_its_kl_in_it():
    """Two completions that scored alike: the one that went further from the reference was worth less."""
    from rlhf.ppo.settings import KlSettings

    step = tiny_step(estimator="rloo", completions=2, kl=KlSettings(coef=0.5))
    near = scored([5, 6, 7, 8], 2, logprobs=[-1.0, -1.0], ref_logprobs=[-1.0, -1.0])
    far = scored([5, 6, 9, 10], 2, logprobs=[-1.0, -1.0], ref_logprobs=[-9.0, -9.0])
    seen = {}
    step.learner.improve, improve = (
        lambda e, m, targets: seen.update(t=targets) or improve(e, m, targets),
        step.learner.improve,
    )
    step.settings = step.learner.settings = step.settings.model_copy(update={"old_logprobs": "service"})
    step([rollout(0, near, far)])
    # KL: 0 and 16 nats; rewards 0 and -8.
    assert seen["t"].advantages.tolist() == pytest.approx([0.0, 0.0, 8.0, 8.0, 0.0, 0.0, -8.0, -8.0], abs=1e-4)


def test_an_estimator_without_critic_moves_no_value_head():
    from rlhf.ppo.settings import CriticSettings

    step = tiny_step(estimator="rloo", completions=4, critic=CriticSettings(kind="shared"))
    step(sampled(step, PROMPTS, 4, share_of_even_tokens))
    assert set(step.learner.modules()) == {"policy"}
    assert (weights_of(step.learner.value_head) == 0).all()
    trained = {id(p) for group in step.learner.optimizers["policy"].param_groups for p in group["params"]}
    assert id(step.learner.value_head.weight) not in trained
