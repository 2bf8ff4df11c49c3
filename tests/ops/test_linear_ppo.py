"""The fused PPO loss against the one loss definition on float64 outputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rlhf.ops import LogprobOutput, PpoTerms, definitions, fused_linear_ppo_loss, policy_loss, ppo_loss
from support.ops_cases import DEVICE, GRADIENT_TOLERANCE, assert_no_worse, gradients


def batch(dtype: torch.dtype = torch.float32, tokens: int = 40, vocab: int = 600) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    hidden, weight = random(tokens, 16, scale=1.0), random(vocab, 16, scale=0.5)
    labels = torch.randint(vocab, (tokens,), generator=generator).to(DEVICE)
    labels[3:6] = -100
    logprobs = definitions.fused_linear_logprobs(hidden, weight, labels).logprobs
    # Ratios within, above and below the clip range.
    old = logprobs + torch.randn(tokens, generator=generator).to(DEVICE) * 0.3
    old[3:6] = torch.nan
    return {
        "hidden_states": hidden,
        "lm_head_weight": weight,
        "lm_head_bias": random(vocab, scale=0.0),
        "labels": labels,
        "old_logprobs": old,
        "advantages": torch.randn(tokens, generator=generator).to(DEVICE),
        "ref_hidden_states": hidden + random(tokens, 16, scale=0.2),
        "ref_lm_head_weight": weight + random(vocab, 16, scale=0.1),
    }


def by_definition(arguments: dict[str, Tensor], terms: PpoTerms, dtype: torch.dtype) -> Tensor:
    of_loss = {name: arguments[name] for name in ("old_logprobs", "advantages")}
    rest = {name: x for name, x in arguments.items() if name not in of_loss}
    rest = {name: x.to(dtype) if x.is_floating_point() and dtype == torch.float64 else x for name, x in rest.items()}
    tokens = definitions.fused_linear_logprobs(**rest, temperature=0.7, logits_dtype=dtype)
    return ppo_loss(
        tokens, of_loss["old_logprobs"].to(dtype), of_loss["advantages"].to(dtype), rest["labels"] != -100, terms
    )[0]


@pytest.mark.parametrize("terms", [PpoTerms(dual_clip=1.5), PpoTerms(ratio=False)], ids=["dual clip", "no ratio"])
def test_other_policy_losses(terms):
    """Fused, with their gradients, and unlike the plain clip on the same tokens."""
    arguments = batch(torch.float32)
    arguments["old_logprobs"] -= 1.0  # so that ratios are about e, beyond every clip
    found = fused_linear_ppo_loss(**arguments, terms=terms, temperature=0.7)
    expected = by_definition(arguments, terms, torch.float64)
    torch.testing.assert_close(found.loss.double(), expected, atol=1e-3, rtol=1e-4)
    assert abs(expected - by_definition(arguments, PpoTerms(), torch.float64)) > 0.1
    own = gradients_of(lambda a: fused_linear_ppo_loss(**a, terms=terms, temperature=0.7).loss, arguments)
    doubled = {name: x.double() if name in NAMES else x for name, x in arguments.items()}
    true = gradients_of(lambda a: by_definition(a, terms, torch.float64), doubled)
    for name, a, b in zip(NAMES, own, true, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-3, msg=name)
    assert found.clipped_mask.any() == terms.ratio


NAMES = ("hidden_states", "lm_head_weight", "lm_head_bias")


def gradients_of(function, arguments):
    return gradients(
        lambda *inputs: function(arguments | dict(zip(NAMES, inputs, strict=True))), *(arguments[n] for n in NAMES)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kl_estimator", ["exact", "k1", "k2", "k3", "abs"])
def test_loss_and_gradients(dtype, kl_estimator):
    arguments, terms = batch(dtype), PpoTerms(0.2, 0.28, 0.1, kl_estimator, 0.01)
    for workspace_bytes in (None, 1):
        found = fused_linear_ppo_loss(**arguments, terms=terms, temperature=0.7, workspace_bytes=workspace_bytes)
        plain = by_definition(arguments, terms, torch.float32)
        truth = by_definition(arguments, terms, torch.float64)
        assert_no_worse(found.loss, plain, truth, 1e-5 * 40, "loss")
        own = gradients_of(
            lambda a, w=workspace_bytes: (
                fused_linear_ppo_loss(**a, terms=terms, temperature=0.7, workspace_bytes=w).loss
            ),
            arguments,
        )
        eager = gradients_of(lambda a: by_definition(a, terms, torch.float32), arguments)
        doubled = {name: x.double() if name in NAMES else x for name, x in arguments.items()}
        true = gradients_of(lambda a: by_definition(a, terms, torch.float64), doubled)
        for name, a, b, c in zip(NAMES, own, eager, true, strict=True):
            assert_no_worse(a, b, c, GRADIENT_TOLERANCE[dtype] * c.abs().max().item(), name)


def test_what_the_loss_was_made_of():
    arguments = batch()
    found = fused_linear_ppo_loss(**arguments, temperature=0.7)
    rest = {name: x for name, x in arguments.items() if name not in ("old_logprobs", "advantages")}
    tokens = definitions.fused_linear_logprobs(**rest, temperature=0.7)
    for name in tokens._fields:
        torch.testing.assert_close(getattr(found.tokens, name), getattr(tokens, name), atol=1e-5, rtol=0)
    mask = arguments["labels"] != -100
    _, clipped_mask = policy_loss(tokens.logprobs, arguments["old_logprobs"], arguments["advantages"], mask, 0.2, 0.2)
    assert torch.equal(found.clipped_mask, clipped_mask)
    assert clipped_mask.any()


def test_estimators_do_with_the_references_logprobs():
    arguments = batch()
    terms = PpoTerms(kl_coef=0.1, kl_estimator="k3")
    whole = fused_linear_ppo_loss(**arguments, terms=terms)
    services = {name: x for name, x in arguments.items() if not name.startswith("ref_")}
    found = fused_linear_ppo_loss(**services, terms=terms, ref_logprobs=whole.tokens.ref_logprobs)
    torch.testing.assert_close(found.loss, whole.loss, atol=1e-5, rtol=1e-6)
    assert torch.equal(found.tokens.ref_logprobs, whole.tokens.ref_logprobs)


def test_the_upstream_gradient_scales():
    arguments = batch()
    once = gradients_of(lambda a: fused_linear_ppo_loss(**a).loss, arguments)
    scaled = gradients_of(lambda a: fused_linear_ppo_loss(**a).loss / 8, arguments)
    assert all(torch.equal(a / 8, b) for a, b in zip(once, scaled, strict=True))


@pytest.mark.parametrize("frozen", list(itertools.product([True, False], repeat=3)))
def test_only_what_is_trained_receives_a_gradient(frozen):
    arguments = batch()
    for name, is_frozen in zip(NAMES, frozen, strict=True):
        arguments[name].requires_grad_(not is_frozen)
    found = fused_linear_ppo_loss(**arguments)
    assert found.loss.requires_grad == (not all(frozen))
    if not all(frozen):
        found.loss.backward()
    assert [arguments[name].grad is None for name in NAMES] == list(frozen)


@pytest.mark.parametrize(
    ("terms", "change", "message"),
    [
        (PpoTerms(kl_coef=0.1), {}, "'exact' needs ref_hidden_states"),
        (PpoTerms(kl_coef=0.1, kl_estimator="k3"), {}, "'k3' needs ref_logprobs or ref_hidden_states"),
        (PpoTerms(), {"advantages": torch.zeros(3)}, r"advantages: shape \(40,\) expected, \(3,\) received"),
    ],
)
def test_a_wrong_argument_is_named(terms, change, message):
    arguments = {name: x for name, x in batch().items() if not name.startswith("ref_")}
    with pytest.raises(ValueError, match=message):
        fused_linear_ppo_loss(**(arguments | change), terms=terms)


def test_terms_that_lack_their_inputs_are_refused():
    tokens = LogprobOutput(torch.zeros(2))
    rest = (torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    for terms, message in (
        (PpoTerms(kl_coef=1.0), "whole distribution"),
        (PpoTerms(kl_coef=1.0, kl_estimator="k1"), "needs the reference's log-probs"),
        (PpoTerms(entropy_coef=1.0), "entropy was not computed"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_loss(tokens, *rest, terms)


def test_kl_is_punished_and_entropy_rewarded_where_tokens_count():
    tokens = LogprobOutput(torch.zeros(2), kl=torch.full((2,), 3.0), entropy=torch.full((2,), 2.0))
    counts_mask = torch.tensor([True, False])
    terms = PpoTerms(kl_coef=0.5, kl_estimator="exact", entropy_coef=0.1)
    assert ppo_loss(tokens, torch.zeros(2), torch.zeros(2), counts_mask, terms)[0].item() == pytest.approx(1.5 - 0.2)


def test_each_side_has_its_clip():
    def loss(ratio, advantage):
        tokens = LogprobOutput(torch.tensor([ratio]).log())
        terms = PpoTerms(clip_low=0.1, clip_high=0.3)
        return ppo_loss(tokens, torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool), terms)[0]

    assert loss(2.0, 1.0).item() == pytest.approx(-1.3)
    assert loss(0.5, -1.0).item() == pytest.approx(0.9)
