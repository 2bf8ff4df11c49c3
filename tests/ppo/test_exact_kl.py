"""Exact KL in the trainer: from hidden states and the reference's output layer, against sums over the vocabulary."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from rlhf.errors import RequestError, StageFailed
from rlhf.models.causal import disable_dropout
from rlhf.models.output_layer import hidden_states, output_layer
from rlhf.ppo.experience import gather, minibatches
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Learner
from rlhf.ppo.reference_layer import ReferenceLayer
from rlhf.ppo.rewards import token_kl
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings
from rlhf.ppo.step import PpoStep
from rlhf.wire.records import HiddenStates
from support.rollouts import sampled_rollouts
from support.tiny import tiny_lm, tiny_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9]]
TEMPERATURE = 0.8


@pytest.fixture
def reference():
    return tiny_lm(seed=1)


def layer_of(model) -> ReferenceLayer:
    layer = output_layer(model)
    return ReferenceLayer(layer.weight.detach(), layer.bias, "")


def new_step(reference, kl, **settings) -> PpoStep:
    policy = tiny_lm()
    disable_dropout(policy)
    learner = Learner(
        policy,
        None,
        PpoSettings(**{"epochs": 1, "whiten_advantages": False, "max_grad_norm": 1e9, **settings}),
        CriticSettings(kind="shared", coef=0.0 + 1e-9),
        kl,
        reference=layer_of(reference),
        temperature=TEMPERATURE,
        pad_id=tiny_tokenizer().pad_token_id,
    )
    return PpoStep(learner, KlController(kl), torch.Generator().manual_seed(0))


@torch.no_grad()
def states_of(model, completion, dtype=torch.float32) -> HiddenStates:
    """What the reference service sends: the state before each token of the response."""
    ids = torch.from_numpy(completion.token_ids.astype("int64"))[None]
    states = hidden_states(model, input_ids=ids)[0, :-1][torch.from_numpy(completion.response_mask[1:])].to(dtype)
    content = states.contiguous().view(torch.uint8).numpy().tobytes()
    return HiddenStates(str(dtype).removeprefix("torch."), tuple(states.shape), content)


def some_rollouts(policy, reference, prompts=PROMPTS, seed=1, **options):
    """With the reference's hidden states, and beside them the log-probs that it would have given."""
    generator = torch.Generator().manual_seed(seed)
    plain = sampled_rollouts(
        policy, reference, prompts, len, new_tokens=6, temperature=TEMPERATURE, generator=generator, **options
    )
    exact = [
        replace(
            r,
            completions=tuple(replace(c, ref_logprobs=None, ref_hidden=states_of(reference, c)) for c in r.completions),
        )
        for r in plain
    ]
    return plain, exact


def kl_by_hand(policy, reference, experience) -> torch.Tensor:
    """[N]: Σ p log(p / r) of the state before each sampled token, sequence by sequence."""
    found = torch.zeros(len(experience.token_ids))
    for start, end in zip(experience.cu_seqlens[:-1].tolist(), experience.cu_seqlens[1:].tolist(), strict=True):
        ids = experience.token_ids[start:end][None]
        log_p, log_r = (
            torch.log_softmax(model(input_ids=ids).logits[0].double() / TEMPERATURE, -1)
            for model in (policy, reference)
        )
        kl = (log_p.exp() * (log_p - log_r)).sum(-1).float()
        found[start + 1 : end] = torch.where(experience.response_mask[start + 1 : end], kl[:-1].detach(), 0.0)
    return found


def assessed(step, rollouts):
    experience = gather(rollouts)
    order = torch.arange(experience.sequences)
    micro = [micro for part in minibatches(experience, 2, 20, order) for micro in part]
    return experience, step.learner.assess(experience, micro)


def test_exact_kl_and_reference_logprobs_from_hidden_states(reference):
    step = new_step(reference, KlSettings(estimator="exact"))
    plain, exact = some_rollouts(step.learner.policy, reference)
    experience, before = assessed(step, exact)
    torch.testing.assert_close(before.kl, kl_by_hand(step.learner.policy, reference, experience), atol=1e-5, rtol=1e-4)
    assert (before.kl[experience.response_mask] > 1e-3).all()
    mask = experience.response_mask
    torch.testing.assert_close(before.ref_logprobs[mask], gather(plain).ref_logprobs[mask], atol=1e-5, rtol=1e-5)


def test_the_exact_estimate_has_the_same_mean_and_less_variance(reference):
    step = new_step(reference, KlSettings(estimator="exact"))
    _, rollouts = some_rollouts(step.learner.policy, reference, PROMPTS[:1] * 400)
    experience, before = assessed(step, rollouts)
    per_sequence = {
        name: experience.sum_per_sequence(token_kl(before, before.logprobs, experience.response_mask, name)).double()
        for name in ("k1", "k3", "exact")
    }
    for name in ("k1", "k3"):
        difference = per_sequence[name] - per_sequence["exact"]
        assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5, name
        assert per_sequence["exact"].var() < 0.5 * per_sequence[name].var(), name


def test_the_loss_has_the_gradient_of_the_exact_kl(reference):
    """With advantages of 0 nothing but the KL term moves the weights."""
    step = new_step(reference, KlSettings(coef=0.0, loss_coef=0.7, loss_estimator="exact"))
    _, rollouts = some_rollouts(step.learner.policy, reference)
    policy = copy.deepcopy(step.learner.policy)
    experience = gather(rollouts)
    total = torch.zeros(())
    for start, end in zip(experience.cu_seqlens[:-1].tolist(), experience.cu_seqlens[1:].tolist(), strict=True):
        ids, mask = experience.token_ids[start:end][None], experience.response_mask[start + 1 : end]
        log_p = torch.log_softmax(policy(input_ids=ids).logits[0, :-1] / TEMPERATURE, -1)
        log_r = torch.log_softmax(reference(input_ids=ids).logits[0, :-1].detach() / TEMPERATURE, -1)
        total = total + 0.7 * (log_p.exp() * (log_p - log_r)).sum(-1)[mask].sum()
    (total / experience.response_mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    _, before = assessed(step, rollouts)
    zeros = torch.zeros_like(before.logprobs)
    from rlhf.ppo.learner import Targets

    targets = Targets(before.logprobs, before.ref_logprobs, before.values, zeros, before.values)
    minibatch = next(minibatches(experience, 1, 10_000, torch.arange(experience.sequences)))
    figures = step.learner.improve(experience, minibatch, targets)
    assert figures.policy_grad_norm == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_a_step_with_every_choice_of_penalty_and_loss(reference, estimator):
    step = new_step(reference, KlSettings(estimator=estimator, loss_coef=0.1, loss_estimator=estimator), minibatches=2)
    plain, exact = some_rollouts(step.learner.policy, reference)
    figures = step(exact if estimator == "exact" else plain)
    assert figures.first_ratio_error == 0.0
    assert figures.kl_mean > 0.1


def test_a_penalty_in_the_loss_alone_draws_the_policy_back(reference):
    step = new_step(reference, KlSettings(coef=0.0, loss_coef=1.0, loss_estimator="exact"), lr=1e-2, epochs=4)
    found = []
    for seed in range(12):
        _, rollouts = some_rollouts(step.learner.policy, reference, PROMPTS * 8, seed)
        even = [replace(r, completions=(replace(r.completions[0], score=0.0),)) for r in rollouts]
        found.append(step(even).kl_mean)
    assert found[-1] < 0.7 * found[0], found


def test_hidden_states_of_another_reference_are_refused(reference):
    step = new_step(reference, KlSettings(estimator="exact"))
    _, rollouts = some_rollouts(step.learner.policy, reference)
    with pytest.raises(StageFailed, match="the reference service was given another model in mid-run"):
        step([replace(rollouts[0], reference_sha256="f" * 64), *rollouts[1:]])


def test_a_batch_with_and_without_hidden_states_is_refused(reference):
    plain, exact = some_rollouts(tiny_lm(), reference)
    with pytest.raises(RequestError, match="cannot make one batch"):
        gather([plain[0], exact[1]])
