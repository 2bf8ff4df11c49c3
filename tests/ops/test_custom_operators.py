"""The operators as torch sees them: registration, torch.compile, and that every kernel is launched."""

from __future__ import annotations

import pytest
import torch

from rlhf.ops import PpoTerms, dispatch, fused_linear_logprobs, fused_linear_ppo_loss, gae, logprobs_kl_from_logits
from rlhf.ops import linear as linear_module
from rlhf.ops import logprobs as logprobs_module
from rlhf.ops import ppo as ppo_module
from support.ops_cases import DEVICE, KERNELS, case, gradients, loss, upstream

KERNEL_NAMES = {"row_partials", "row_outputs", "row_gradient", "gae_scan"}


def head(**grad: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias, ref = (
        torch.randn(*s, generator=generator).to(DEVICE) for s in ((5, 8), (70, 8), (70,), (5, 8))
    )
    labels = torch.tensor([1, -100, 69, 4, 5], device=DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels, ref


@pytest.mark.skipif(not KERNELS, reason="plain torch does not go through this operator")
@pytest.mark.parametrize("with_reference", [True, False])
def test_logits_operators_are_registered_rightly(with_reference):
    logits, ref_logits, labels = case(3, 60)
    ref = ref_logits if with_reference else None
    torch.library.opcheck(logprobs_module._statistics, (logits.requires_grad_(), ref, labels, 0.7, -100))
    found = logprobs_module._statistics(logits.detach(), ref, labels, 0.7, -100)
    ones = torch.ones(3, device=DEVICE)
    torch.library.opcheck(
        logprobs_module._gradient,
        (
            logits.detach(),
            ref,
            labels,
            found[2],
            found[3],
            found[6],
            0.7,
            -100,
            ones,
            ones if with_reference else None,
            None,
            ones,
        ),
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
def test_linear_operator_is_registered_rightly(keep, with_reference):
    hidden, weight, bias, labels, ref = head()
    reference = (ref, weight.detach() * 1.1, None) if with_reference else (None, None, None)
    torch.library.opcheck(
        linear_module._statistics,
        (
            hidden,
            weight,
            bias,
            labels,
            *reference,
            0.7,
            -100,
            70,
            torch.float32,
            70 if keep else 128,
            128,
            70 if keep else 0,
            "",
        ),
    )


def test_ppo_operator_is_registered_rightly():
    hidden, weight, bias, labels, ref = head()
    torch.library.opcheck(
        ppo_module._loss,
        (
            hidden, weight, bias, labels, ref, weight.detach() * 1.1, None, torch.zeros(5, device=DEVICE) - 4,
            torch.ones(5, device=DEVICE), None, [True, True, True], 0.2, 0.2, 0.1, "exact", 0.01, 3.0, True, 0.7, -100,
            70, torch.float32, 2**20, "",
        ),
    )  # fmt: skip


def compiled_agrees(function, *inputs):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    for a, b in zip(gradients(compiled, *inputs), gradients(function, *inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_compiled_logits_level():
    logits, ref_logits, labels = case(3, 60)
    weights = upstream(labels.shape)
    compiled_agrees(lambda z: loss(logprobs_kl_from_logits(z * 1.5, ref_logits, labels, 0.7), weights), logits)


def test_compiled_linear_level():
    hidden, weight, bias, labels, ref = (x.detach() for x in head())
    weights = upstream(labels.shape)

    def all_outputs(h, w, b):
        return loss(fused_linear_logprobs(h * 1.5, w, labels, ref_hidden_states=ref, lm_head_bias=b), weights)

    compiled_agrees(all_outputs, hidden, weight, bias)


def test_compiled_ppo_loss():
    hidden, weight, bias, labels, ref = (x.detach() for x in head())
    old, advantages = torch.full((5,), -4.0, device=DEVICE), torch.ones(5, device=DEVICE)

    def ppo(h, w, b):
        return fused_linear_ppo_loss(
            h * 1.5, w, labels, old, advantages, terms=PpoTerms(kl_coef=0.1), ref_hidden_states=ref, lm_head_bias=b
        ).loss

    compiled_agrees(ppo, hidden, weight, bias)


@pytest.mark.skipif(not KERNELS, reason="plain torch launches none")
def test_every_kernel_is_launched():
    dispatch.launches.clear()
    hidden, weight, bias, labels, ref = head()
    found = fused_linear_logprobs(hidden, weight, labels, ref_hidden_states=ref, lm_head_bias=bias)
    found.kl.sum().backward()
    ones = torch.ones(2, 5, device=DEVICE)
    gae(ones, ones, ones.bool(), 1.0, 0.95)
    assert set(dispatch.launches) == KERNEL_NAMES
    assert all(count > 0 for count in dispatch.launches.values())
