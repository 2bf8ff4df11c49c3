"""What holds of log-probs, KL, entropy and their gradients whatever the logits are."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rlhf.ops import dispatch, logprobs_from_logits, logprobs_kl_from_logits
from support.ops_cases import DEVICE, KERNELS, case, gradients, loss, upstream


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 600),
    spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    apart=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bounds(seed, vocab, spread, apart, temperature, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=generator) * spread
    ref_logits = logits + torch.randn(3, vocab, generator=generator) * apart
    labels = torch.randint(vocab, (3,), generator=generator).to(DEVICE)
    logits, ref_logits = logits.to(DEVICE, dtype), ref_logits.to(DEVICE, dtype)
    found = logprobs_kl_from_logits(logits, ref_logits, labels, temperature)
    assert (found.logprobs <= 1e-6).all()
    assert (found.ref_logprobs <= 1e-6).all()
    assert (found.kl >= -1e-6).all()
    assert (found.entropy >= -1e-5).all()
    assert (found.entropy <= math.log(vocab) + 1e-5).all()
    same = logprobs_kl_from_logits(logits, logits, labels, temperature)
    assert (same.kl == 0).all()
    weights = upstream(labels.shape)[:3]
    (gradient,) = gradients(
        lambda z: loss(
            logprobs_kl_from_logits(z, ref_logits, labels, temperature), [*weights, torch.zeros(3).to(DEVICE)]
        ),
        logits.float(),
    )
    # Probabilities sum to 1, so that a shift of a row changes nothing.
    assert (gradient.double().sum(-1).abs() <= 2e-5 * gradient.double().abs().sum(-1).clamp_min(1.0)).all()


def test_ignored_labels_give_zero_and_no_gradient():
    logits, ref_logits, labels = case(4, 300)
    logits[1] = torch.nan
    weights = upstream(labels.shape)
    found = logprobs_kl_from_logits(logits, ref_logits, labels)
    assert all((getattr(found, name)[1] == 0) for name in found._fields)
    if KERNELS:
        (gradient,) = gradients(lambda z: loss(logprobs_kl_from_logits(z, ref_logits, labels), weights), logits)
        assert (gradient[1] == 0).all()
        assert (gradient[0] != 0).any()
    everything = logprobs_kl_from_logits(logits, ref_logits, torch.full_like(labels, -100))
    assert all((getattr(everything, name) == 0).all() for name in everything._fields)


def test_not_a_number_stays_not_a_number():
    logits, ref_logits, labels = case(4, 3000)
    labels[1] = 2
    logits[0, 17], ref_logits[2, 2900] = torch.nan, torch.nan
    found = logprobs_kl_from_logits(logits, ref_logits, labels)
    assert [row.item() for row in found.logprobs.isnan()] == [True, False, False, False]
    assert [row.item() for row in found.entropy.isnan()] == [True, False, False, False]
    assert [row.item() for row in found.ref_logprobs.isnan()] == [False, False, True, False]
    assert [row.item() for row in found.kl.isnan()] == [True, False, True, False]
    (gradient,) = gradients(lambda z: logprobs_from_logits(z, labels).logprobs.sum(), logits)
    assert gradient[0].isnan().all()
    assert gradient[3].isfinite().all()


def test_two_runs_are_identical():
    logits, ref_logits, labels = case(4, 40_000)
    weights = upstream(labels.shape)

    def run():
        found = logprobs_kl_from_logits(logits, ref_logits, labels, 0.7)
        (gradient,) = gradients(lambda z: loss(logprobs_kl_from_logits(z, ref_logits, labels, 0.7), weights), logits)
        return [*found, gradient]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("shape", [(0, 11), (2, 0, 11)])
def test_no_tokens(shape):
    logits = torch.zeros(shape, device=DEVICE, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=DEVICE)
    found = logprobs_kl_from_logits(logits, logits, labels)
    assert all(getattr(found, name).shape == labels.shape for name in found._fields)
    found.kl.sum().backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels: shape \(3,\) expected, \(4,\) received"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels: int64 expected, int32 received"),
        ({"temperature": 0.0}, "temperature: must be > 0, 0.0 received"),
        ({"temperature": math.nan}, "temperature: must be > 0, nan received"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, "logits: float32 or .* expected, int64 received"),
        (
            {"logits": torch.zeros(5, 3).T},
            r"logits: a contiguous last dimension \(stride 1\) expected, stride 3 received",
        ),
        (
            {"logits": torch.zeros(3, 0)},
            r"logits: at least 1 dimension\(s\), the last not empty, expected, \(3, 0\) rec",
        ),
        ({"ref_logits": torch.zeros(3, 6)}, r"ref_logits: shape \(3, 5\) expected, \(3, 6\) received"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {
        "logits": torch.zeros(3, 5),
        "ref_logits": torch.zeros(3, 5),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    arguments |= change
    with pytest.raises(ValueError, match=message):
        logprobs_kl_from_logits(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


@pytest.mark.skipif(DEVICE != "cpu", reason="seen without waiting on a CPU only")
@pytest.mark.parametrize("label", [5, -1])
def test_a_label_outside_the_vocabulary_is_named(label):
    with pytest.raises(ValueError, match=rf"labels: within \[0, 5\) or -100 expected, {label} received"):
        logprobs_from_logits(torch.zeros(2, 5), torch.tensor([0, label]))


def test_a_label_outside_the_vocabulary_that_nobody_saw_is_not_a_number(monkeypatch):
    monkeypatch.setattr("rlhf.ops.logprobs.check_labels", lambda *arguments: None)
    logits = torch.zeros(3, 5, device=DEVICE)
    labels = torch.tensor([0, 7, -3], device=DEVICE)
    found = logprobs_kl_from_logits(logits, logits, labels)
    assert [x.item() for x in found.logprobs.isnan()] == [False, True, True]


def test_kernels_run_where_they_should():
    before = sum(dispatch.launches.values())
    logits, _, labels = case(3, 50)
    logprobs_from_logits(logits, labels)
    assert (sum(dispatch.launches.values()) > before) == KERNELS
