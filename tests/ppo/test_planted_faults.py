"""Faults that show over several steps, planted into the training of a tiny policy, and named by its monitor."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.wire.records import Sampling
from support.monitored import NEW_TOKENS, PROMPTS, distinct_tokens, found_by, models, rollouts_of
from support.tiny import tiny_lm, tiny_tokenizer

END = tiny_tokenizer().eos_token_id
CRITICLESS = {"estimator": "reinforce++", "epochs": 1, "lr": 1e-3}


def course(step, monitor, *, steps, reward=distinct_tokens, batch=4):
    """What the monitor says of each step of a run on fresh rollouts.

    Args:
        reward: of a response's tokens, or a function of the step's number that gives one.
    """
    policy = step.learner.policy
    reference, found = copy.deepcopy(policy), []
    for number in range(1, steps + 1):
        sampling = Sampling(seed=1000 * number)
        rollouts = rollouts_of(policy, reference, sampling=sampling, prompts=PROMPTS * batch, reward=reward)
        found.append(found_by(step, monitor, rollouts, number))
    return found


def named(found):
    return set().union(*found)


def trained(*, ppo=None, window=2, **sections):
    return models(ppo={**CRITICLESS, **(ppo or {})}, monitor={"window": window}, **sections)


def test_a_healthy_run_is_met_with_silence():
    assert named(course(*trained(), steps=6)) == set()


def test_a_learning_rate_that_is_far_too_large_fills_the_clip():
    found = course(*trained(ppo={"lr": 0.03, "epochs": 4}), steps=3)
    assert "clip_fraction" in found[-1]


def test_rewards_that_are_all_alike_leave_no_gradient():
    found = course(*trained(kl={"coef": 0.0}), steps=4, reward=lambda response: 1.0)
    assert found[-1]["gradient"] == "the policy's gradient has been 0 for 2 steps: nothing is learned"


def test_frozen_parameters_leave_no_gradient():
    step, monitor = trained()
    zero = {parameter: parameter.register_hook(torch.zeros_like) for parameter in step.learner.policy.parameters()}
    assert zero
    assert "nothing is learned" in course(step, monitor, steps=4)[-1]["gradient"]


def test_a_score_out_of_all_proportion_makes_the_gradient_leap():
    step, monitor = trained(ppo={"whiten_advantages": False})
    assert named(course(step, monitor, steps=3)) == set()
    policy = step.learner.policy
    rollouts = rollouts_of(policy, copy.deepcopy(policy))
    (completion,) = rollouts[0].completions
    rollouts[0] = replace(rollouts[0], completions=(replace(completion, score=1e4),))
    assert "the policy's gradient has norm" in found_by(step, monitor, rollouts, number=4)["gradient"]


def test_a_critic_of_noise_that_does_not_learn_knows_less_than_a_constant():
    critic = {"kind": "separate", "lr": 1e-12}
    step, monitor = trained(ppo={"estimator": "gae"}, critic=critic)
    torch.manual_seed(0)
    torch.nn.init.normal_(step.learner.critic.head.weight, std=3.0)
    found = course(step, monitor, steps=8)
    assert "explained_variance" in found[-1]
    assert "explained_variance" not in named(found[:-1]), "it has four windows to warm up"


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda entropy: entropy * NEW_TOKENS, "nats per token, and 280 tokens allow"),
        (lambda entropy: torch.full_like(entropy, -1.0), "none is below 0"),
    ],
    ids=["a sum for a mean", "padding at a log-prob of 1"],
)
def test_an_entropy_that_is_none(wrong, what):
    step, monitor = trained()
    assess = step.learner.assess

    def assessed(experience, micro_batches):
        before = assess(experience, micro_batches)
        return replace(before, entropy=wrong(before.entropy))

    step.learner.assess = assessed
    assert what in course(step, monitor, steps=1)[0]["entropy"]


def ready_to_end():
    """A policy whose responses have about four tokens."""
    policy = tiny_lm()
    with torch.no_grad():
        policy.get_output_embeddings().weight[END] *= 4.0
    return policy


def test_a_reward_that_pays_for_length():
    """The reward model's weakness: more tokens are better. The policy finds it, and stops ending."""
    step, monitor = trained(ppo={"lr": 3e-3, "epochs": 2}, kl={"coef": 0.0}, model=ready_to_end())
    found = course(step, monitor, steps=16, reward=lambda response: float(len(response)), batch=8)
    assert "the score rose from" in found[-1]["length"]
    assert "completions grew from" in found[-1]["length"]


def test_a_reward_that_pays_for_a_few_words():
    """Whatever consists of a seventh of the vocabulary scores high: completions become alike."""
    step, monitor = trained(ppo={"lr": 1e-2, "epochs": 2}, kl={"coef": 0.0})
    favourites = set(np.argsort(np.random.default_rng(0).random(280))[:40].tolist())
    found = course(
        step, monitor, steps=16, batch=8, reward=lambda response: float(np.mean([t in favourites for t in response]))
    )
    assert "the score rose from" in found[-1]["ngrams"]
