"""Log-probs, KL and entropy from logits, and their gradient, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.ops import definitions, logprobs_from_logits, logprobs_kl_from_logits
from support.ops_cases import DEVICE, GRADIENT_TOLERANCE, assert_no_worse, case, gradients, loss, upstream

VOCABULARIES = (1, 7, 1000, 32000, 50257, 128256, 151936)


def assert_outputs(logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: float) -> None:
    found = logprobs_kl_from_logits(logits, ref_logits, labels, temperature)
    plain = definitions.logprobs_kl_from_logits(logits, ref_logits, labels, temperature)
    truth = definitions.logprobs_kl_from_logits(logits.double(), ref_logits.double(), labels, temperature)
    for name in found._fields:
        assert getattr(found, name).dtype == torch.float32
        assert_no_worse(getattr(found, name), getattr(plain, name), getattr(truth, name), 1e-5, name)


def assert_gradient(logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: float) -> None:
    weights = upstream(labels.shape)

    def by(function):
        return lambda z: loss(function(z, ref_logits.to(z.dtype), labels, temperature), weights)

    (found,) = gradients(by(logprobs_kl_from_logits), logits)
    (plain,) = gradients(by(definitions.logprobs_kl_from_logits), logits)
    (truth,) = gradients(by(definitions.logprobs_kl_from_logits), logits.double())
    assert found.dtype == logits.dtype
    scale = truth.abs().max().item()
    assert_no_worse(found, plain, truth, GRADIENT_TOLERANCE[logits.dtype] * scale, "gradient")


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradient_of_any_vocabulary_and_dtype(vocab, dtype):
    for temperature in (0.1, 1.0, 2.0):
        inputs = case(3, vocab, dtype)
        assert_outputs(*inputs, temperature)
        assert_gradient(*inputs, temperature)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_a_shift_of_all_logits(shift):
    inputs = case(4, 5000, shift=shift)
    assert_outputs(*inputs, 1.0)
    assert_gradient(*inputs, 1.0)


def test_all_logits_far_below_zero():
    """A maximum that starts at 0 instead of below every logit makes log 0 of rows below -88."""
    inputs = case(4, 3000, shift=-200.0)
    assert inputs[0].max() < -120
    assert_outputs(*inputs, 1.0)


def test_masked_entries():
    logits, ref_logits, labels = case(4, 3000)
    logits[:, 1000:2500] = -torch.inf
    ref_logits[:, 1200:2500] = -torch.inf
    labels[:] = torch.tensor([3, -100, 999, 2999])
    assert_outputs(logits, ref_logits, labels, 0.7)
    assert_gradient(logits, ref_logits, labels, 0.7)
    weights = upstream(labels.shape)
    (gradient,) = gradients(lambda z: loss(logprobs_kl_from_logits(z, ref_logits, labels), weights), logits)
    assert (gradient[:, 1000:2500] == 0).all()


def test_a_whole_tile_of_masked_entries_before_the_rest():
    logits, ref_logits, labels = case(3, 100_000)
    logits[:, :70_000] = -torch.inf
    ref_logits[:, :70_000] = -torch.inf
    labels[:] = 99_999
    assert_outputs(logits, ref_logits, labels, 1.0)


def test_a_token_that_the_reference_excludes_is_infinitely_far():
    logits, ref_logits, labels = case(3, 50)
    ref_logits[0, 7] = -torch.inf
    kl = logprobs_kl_from_logits(logits, ref_logits, labels).kl
    assert kl[0] == math.inf
    assert kl[2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_probability_near_one(dtype):
    """The label's gradient is the small 1 - p: to read it back from a rounded buffer loses all of it."""
    logits, ref_logits, labels = case(3, 2000, dtype)
    labels[:] = 5
    logits[:, 5] = logits.float().max() + 8
    assert_outputs(logits, ref_logits, labels, 1.0)
    ones = torch.ones(3, device=DEVICE)
    (found,) = gradients(lambda z: (logprobs_from_logits(z, labels).logprobs * ones).sum(), logits)
    (truth,) = gradients(lambda z: definitions.logprobs_from_logits(z, labels).logprobs.sum(), logits.double())
    assert (truth[:, 5] > 1e-4).all()
    assert (truth[:, 5] < 2e-2).all()
    error = ((found[:, 5].double() - truth[:, 5]) / truth[:, 5]).abs().max().item()
    # 1 - p itself is a difference in float32.
    assert error < {torch.float32: 3e-3, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.parametrize("kl", [1e-5, 1e-3])
def test_a_reference_that_almost_agrees(kl):
    """Near the start of training KL is about 0, and what is subtracted must not drown it."""
    logits, ref_logits, labels = case(6, 32000, apart=math.sqrt(2 * kl))
    labels[1] = 4
    found = logprobs_kl_from_logits(logits, ref_logits, labels)
    truth = definitions.logprobs_kl_from_logits(logits.double(), ref_logits.double(), labels)
    assert (truth.kl / kl).log().abs().max() < math.log(3)
    assert ((found.kl - truth.kl) / truth.kl).abs().max() < 0.05
    (gradient,) = gradients(lambda z: logprobs_kl_from_logits(z, ref_logits, labels).kl.sum(), logits)
    (true_gradient,) = gradients(
        lambda z: definitions.logprobs_kl_from_logits(z, ref_logits.double(), labels).kl.sum(), logits.double()
    )
    assert ((gradient - true_gradient).norm() / true_gradient.norm()).item() < 0.05


def test_logprobs_alone_and_with_entropy():
    logits, ref_logits, labels = case(5, 700)
    both = logprobs_kl_from_logits(logits, ref_logits, labels, 0.7)
    alone = logprobs_from_logits(logits, labels, 0.7, return_entropy=True)
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(alone, name), getattr(both, name), atol=1e-6, rtol=1e-6)
    assert alone.kl is alone.ref_logprobs is alone.ref_logsumexp is alone.logsumexp is None
    assert logprobs_from_logits(logits, labels).entropy is None


@pytest.mark.parametrize("name", ["logprobs", "kl", "entropy", "logsumexp"])
def test_each_output_has_its_own_gradient(name):
    """One output at a time: what the loss does not depend on takes no part."""
    logits, ref_logits, labels = case(4, 900)

    def by(function):
        return lambda z: getattr(function(z, ref_logits.to(z.dtype), labels, 0.7), name).sum()

    (found,) = gradients(by(logprobs_kl_from_logits), logits)
    (truth,) = gradients(by(definitions.logprobs_kl_from_logits), logits.double())
    torch.testing.assert_close(found.double(), truth, atol=2e-6, rtol=1e-4)


def test_rows_that_lie_apart_are_read_where_they_are():
    wide = torch.randn(2, 5, 4, 300, device=DEVICE)
    labels = torch.randint(300, (2, 4), device=DEVICE)
    logits, ref_logits = wide[:, :-1, 1], wide[:, 1:, 2]
    found = logprobs_kl_from_logits(logits, ref_logits, labels)
    truth = definitions.logprobs_kl_from_logits(logits.double(), ref_logits.double(), labels)
    torch.testing.assert_close(found.kl.double(), truth.kl, atol=1e-5, rtol=1e-5)
    weights = upstream(labels.shape)
    gradient = gradients(lambda w: loss(logprobs_kl_from_logits(w[:, :-1, 1], ref_logits, labels), weights), wide)[0]
    true_gradient = gradients(
        lambda w: loss(definitions.logprobs_kl_from_logits(w[:, :-1, 1], ref_logits.double(), labels), weights),
        wide.double(),
    )[0]
    torch.testing.assert_close(gradient.double(), true_gradient, atol=1e-5, rtol=1e-4)


def test_four_dimensions_and_padded_rows():
    wide = torch.randn(2, 3, 2, 130, device=DEVICE)[..., :101]
    labels = torch.randint(101, (2, 3, 2), device=DEVICE)
    found = logprobs_from_logits(wide, labels, return_entropy=True)
    truth = definitions.logprobs_from_logits(wide.double(), labels, return_entropy=True)
    assert found.logprobs.shape == labels.shape
    torch.testing.assert_close(found.entropy.double(), truth.entropy, atol=1e-5, rtol=1e-5)


def test_one_row_alone():
    logits, ref_logits, labels = case(3, 200)
    found, rows = (
        logprobs_kl_from_logits(logits[0], ref_logits[0], labels[0]),
        logprobs_kl_from_logits(logits, ref_logits, labels),
    )
    assert found.kl.shape == ()
    torch.testing.assert_close(found.kl, rows.kl[0])


def test_a_gradient_written_over_the_logits():
    logits, ref_logits, labels = case(4, 900)
    weights = upstream(labels.shape)
    (expected,) = gradients(lambda z: loss(logprobs_kl_from_logits(z, ref_logits, labels), weights), logits)
    own = logits.clone().requires_grad_()
    loss(logprobs_kl_from_logits(own, ref_logits, labels, inplace_backward=True), weights).backward()
    assert torch.equal(own.grad, expected)


def test_the_reference_receives_no_gradient():
    logits, ref_logits, labels = case(3, 50)
    output = logprobs_kl_from_logits(logits.requires_grad_(), ref_logits.requires_grad_(), labels)
    assert not output.ref_logprobs.requires_grad
    assert not output.ref_logsumexp.requires_grad
    output.kl.sum().backward()
    assert ref_logits.grad is None
    assert logits.grad is not None
