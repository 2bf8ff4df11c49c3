"""The eager definitions against float64, autograd and worked examples."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from rlhf.ops import definitions, gae, kl_penalty, logprobs_from_logits


def test_logprobs_agree_with_float64_softmax():
    logits = torch.randn(3, 5, 11) * 10
    labels = torch.randint(11, (3, 5))
    truth = (logits.double() / 0.7).softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).log()
    found = logprobs_from_logits(logits, labels, 0.7).logprobs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)


def test_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits = (torch.randn(4, 1000) * 5).bfloat16()
    labels = torch.randint(1000, (4,))
    truth = torch.log_softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs_from_logits(logits, labels).logprobs.double(), truth, atol=1e-5, rtol=1e-5)


def test_ignored_labels_give_zero_and_no_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    output = logprobs_from_logits(logits, labels, return_entropy=True)
    assert (output.logprobs[labels == -100] == 0).all()
    assert (output.entropy[labels == -100] == 0).all()
    (output.logprobs.sum() + output.entropy.sum()).backward()
    assert (logits.grad[labels == -100] == 0).all()
    assert (logits.grad[labels != -100] != 0).any()


def test_entropy_of_uniform_and_of_masked_logits():
    logits = torch.zeros(1, 8)
    logits[0, 4:] = -torch.inf
    labels = torch.tensor([0])
    assert logprobs_from_logits(logits, labels, return_entropy=True).entropy.item() == pytest.approx(math.log(4))


def test_gradients_of_the_definitions():
    logits, ref_logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([1, -100, 4])

    def outputs(z):
        found = definitions.logprobs_kl_from_logits(z, ref_logits, labels, 0.5)
        return found.logprobs, found.kl, found.entropy, found.logsumexp

    assert gradcheck(outputs, (logits.requires_grad_(),))


def test_gradients_of_the_linear_definition():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((2, 3), (5, 3), (5,))
    )
    ref_hidden = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    # A copy: gradcheck changes the inputs in place.
    ref_weight = weight.detach().clone()

    def outputs(h, w, b):
        found = definitions.fused_linear_logprobs(
            h, w, torch.tensor([1, 4]), ref_hidden_states=ref_hidden, ref_lm_head_weight=ref_weight,
            lm_head_bias=b, logits_dtype=torch.float64,
        )  # fmt: skip
        return found.logprobs, found.kl, found.entropy, found.logsumexp

    assert gradcheck(outputs, (hidden, weight, bias))


def test_the_exact_kl_is_the_sum_over_the_vocabulary():
    logits, ref_logits = torch.randn(2, 4, 9, dtype=torch.float64)
    p, r = logits.softmax(-1), ref_logits.softmax(-1)
    found = definitions.logprobs_kl_from_logits(logits, ref_logits, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(found.kl, (p * (p / r).log()).sum(-1))
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1))


def test_estimators_are_finite_in_value_and_gradient_however_large_the_difference():
    for d in (-1000.0, -100.0, -81.0, -80.0, 0.0, 80.0, 1000.0):
        for name in ("k1", "k2", "k3", "abs"):
            logprobs = torch.tensor([d], requires_grad=True)
            estimate = kl_penalty(logprobs, torch.zeros(1), name)
            estimate.sum().backward()
            assert estimate.isfinite().all(), (d, name)
            assert logprobs.grad.isfinite().all(), (d, name)


@pytest.mark.parametrize("d", [1e-6, -1e-4, 1e-3, 0.0299, -0.0301, 0.5, -3.0])
def test_k3_and_its_gradient_keep_their_digits(d):
    x = torch.tensor([d], requires_grad=True)
    estimate = kl_penalty(x, torch.zeros(1), "k3")
    estimate.sum().backward()
    exact = x.detach().double()
    torch.testing.assert_close(estimate.double(), torch.expm1(-exact) + exact + (0.0), rtol=2e-5, atol=1e-17)
    torch.testing.assert_close(x.grad.double(), -torch.expm1(-exact), rtol=2e-5, atol=0)


def test_k3_goes_on_as_a_straight_line_where_it_would_overflow():
    x = torch.tensor([-80.0, -81.0, -90.0], requires_grad=True, dtype=torch.float64)
    estimate = kl_penalty(x, torch.zeros(3, dtype=torch.float64), "k3")
    estimate.sum().backward()
    slope = 1.0 - math.exp(80)
    torch.testing.assert_close(estimate, math.exp(80) + slope * (x + 80).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad[1:], torch.full((2,), slope, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_definition_of_kl_does_not_drown_in_rounding():
    """Errors of log Σ exp are common to a row, and would be as large as this KL."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 32000, generator=generator) + 1000
    ref_logits = logits + 1e-3 * torch.randn(8, 32000, generator=generator)
    labels = torch.zeros(8, dtype=torch.int64)
    found = definitions.logprobs_kl_from_logits(logits, ref_logits, labels).kl
    truth = definitions.logprobs_kl_from_logits(logits.double(), ref_logits.double(), labels).kl
    # Up to 0.06, as the processor rounds; with log Σ exp left in, 0.9 on the same one.
    assert ((found - truth) / truth).abs().max() < 0.15


def test_wrong_shapes_and_temperatures_are_named():
    with pytest.raises(ValueError, match="labels: shape"):
        logprobs_from_logits(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature"):
        logprobs_from_logits(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 0.0)


def test_kl_estimators_have_the_bias_and_variance_of_schulmans_table():
    """http://joschu.net/blog/kl-approx.html: q = N(0, 1), p = N(0.1, 1), true KL(q ‖ p) = 0.005."""
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, p = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.1, 1.0)
    truth = 0.005
    estimates = {name: kl_penalty(q.log_prob(x), p.log_prob(x), name) for name in ("k1", "k2", "k3")}
    spread = {name: (values.std() / truth).item() for name, values in estimates.items()}
    assert spread == pytest.approx({"k1": 20.0, "k2": 1.42, "k3": 1.42}, rel=0.02)
    for name, values in estimates.items():
        standard_error = values.std().item() / math.sqrt(len(x))
        assert abs(values.mean().item() - truth) < 4 * standard_error + (0.00002 if name == "k2" else 0.0)


def test_k3_keeps_its_digits_for_tiny_differences():
    d = 1e-4
    k3 = kl_penalty(torch.tensor([0.0]), torch.tensor([-d]), "k3").item()
    assert k3 == pytest.approx(d * d / 2, rel=1e-2)


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


def gae_by_definition(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}: the double sum of the paper, for one sequence without gaps."""
    deltas = [r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_gae_is_the_double_sum():
    rewards, values = torch.randn(9), torch.randn(9)
    found = gae(rewards[None], values[None], torch.ones(1, 9, dtype=torch.bool), 0.9, 0.8)[0]
    assert found.tolist() == pytest.approx(gae_by_definition(rewards.tolist(), values.tolist(), 0.9, 0.8), abs=1e-5)


def test_gae_skips_what_is_not_a_response_token():
    """Prompt, padding and a tool's answer in the middle: the same advantages as without them."""
    rewards, values = torch.randn(4), torch.randn(4)
    mask = torch.tensor([[False, True, True, False, False, True, True, False]])
    wide_rewards, wide_values = torch.full((1, 8), 7.0), torch.full((1, 8), -3.0)
    wide_rewards[mask], wide_values[mask] = rewards, values
    found = gae(wide_rewards, wide_values, mask, 0.9, 0.8)
    assert found[mask].tolist() == pytest.approx(
        gae_by_definition(rewards.tolist(), values.tolist(), 0.9, 0.8), abs=1e-5
    )
    assert (found[~mask] == 0).all()
