"""Log-probs, KL and entropy from hidden states, and their gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.ops import LogprobOutput, definitions, fused_linear_logprobs
from support.ops_cases import DEVICE, GRADIENT_TOLERANCE, assert_no_worse, gradients, loss, upstream

KEPT, RECOMPUTED = 2**28, 1
SOME_KEPT = 4 * 128 * 9 * (2 * 4 + 4)
"""Of 9 tokens and two models: slices of 128 columns, and some of them kept."""
WORK = [
    *(
        pytest.param(vocab, workspace_bytes, id=f"{name}-{vocab}")
        for vocab in (1, 7, 700)
        for name, workspace_bytes in (("kept", KEPT), ("some kept", SOME_KEPT), ("recomputed", RECOMPUTED))
    ),
    pytest.param(3001, KEPT, id="kept-3001"),
    pytest.param(3001, 2 * SOME_KEPT, id="some kept-3001"),
]
"""Vocabulary and workspace. Of 3001 columns in slices of 384 the first 1152 are kept; slices of 128, of which 700
columns have six, would take half a minute in Triton's interpreter."""


def layers(
    dtype: torch.dtype = torch.float32, *, tokens: tuple[int, ...] = (9,), vocab: int = 700, apart: float = 0.1
) -> dict[str, Tensor]:
    """Hidden states, weights and biases of a policy and a reference nearby; one label is ignored."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    hidden, weight, bias = random(*tokens, 32, scale=1.0), random(vocab, 32, scale=0.5), random(vocab, scale=1.0)
    labels = torch.randint(vocab, tokens, generator=generator).to(DEVICE)
    labels.view(-1)[1:2] = -100
    return {
        "hidden_states": hidden,
        "lm_head_weight": weight,
        "labels": labels,
        "ref_hidden_states": hidden + apart * random(*tokens, 32, scale=1.0),
        "ref_lm_head_weight": weight + apart * random(vocab, 32, scale=0.5),
        "lm_head_bias": bias,
        "ref_lm_head_bias": bias,
    }


def double(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}


def truth(arguments: dict[str, Tensor], **options) -> LogprobOutput:
    return definitions.fused_linear_logprobs(**double(arguments), logits_dtype=torch.float64, **options)


def all_gradients(function, arguments: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    """By hidden states, weight and bias, of a loss of every output."""
    names = ("hidden_states", "lm_head_weight", "lm_head_bias")
    weights = upstream(arguments["labels"].shape)

    def scalar(*inputs: Tensor) -> Tensor:
        return loss(function(**(arguments | dict(zip(names, inputs, strict=True))), **options), weights)

    return gradients(scalar, *(arguments[name] for name in names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocab", "workspace_bytes"), WORK)
def test_outputs_and_gradients(vocab, dtype, workspace_bytes):
    arguments = layers(dtype, vocab=vocab)
    for temperature in (0.5, 1.0):
        found = fused_linear_logprobs(**arguments, temperature=temperature, workspace_bytes=workspace_bytes)
        plain = definitions.fused_linear_logprobs(**arguments, temperature=temperature)
        exact = truth(arguments, temperature=temperature)
        for name in found._fields:
            assert getattr(found, name).dtype == torch.float32
            assert_no_worse(getattr(found, name), getattr(plain, name), getattr(exact, name), 1e-5, name)
        options = {"temperature": temperature}
        own = all_gradients(fused_linear_logprobs, arguments, workspace_bytes=workspace_bytes, **options)
        eager = all_gradients(definitions.fused_linear_logprobs, arguments, **options)
        true = all_gradients(
            definitions.fused_linear_logprobs, double(arguments), logits_dtype=torch.float64, **options
        )
        for name, a, b, c in zip(("hidden", "weight", "bias"), own, eager, true, strict=True):
            assert a.dtype == dtype
            assert_no_worse(a, b, c, GRADIENT_TOLERANCE[dtype] * c.abs().max().item(), name)


def test_the_width_of_a_slice_changes_nothing_but_rounding():
    arguments = layers(vocab=1500)
    whole = fused_linear_logprobs(**arguments)
    for columns in (128, 384, 1024):
        workspace_bytes = columns * 9 * (2 * 4 + 4)
        sliced = fused_linear_logprobs(**arguments, workspace_bytes=workspace_bytes)
        for name in whole._fields:
            torch.testing.assert_close(getattr(sliced, name), getattr(whole, name), atol=1e-5, rtol=0)


def test_the_backward_pass_computes_again_only_what_was_not_kept(monkeypatch):
    from rlhf.ops import heads

    arguments = layers(vocab=1500)
    widths = []
    original = heads.Head.logits

    def recording(self, columns, *rest):
        widths.append(columns.stop - columns.start)
        return original(self, columns, *rest)

    monkeypatch.setattr(heads.Head, "logits", recording)
    for workspace_bytes, expected in ((KEPT, 0), (SOME_KEPT, 1500 - 512), (RECOMPUTED, 1500)):
        hidden = arguments["hidden_states"].clone().requires_grad_()
        found = fused_linear_logprobs(**(arguments | {"hidden_states": hidden}), workspace_bytes=workspace_bytes)
        widths.clear()
        found.logprobs.sum().backward()
        assert sum(widths) == expected


def test_values_with_and_without_gradient_are_the_same_to_the_last_bit():
    """A ratio of the two is then exactly 1."""
    arguments = layers(vocab=1500)
    for workspace_bytes in (KEPT, SOME_KEPT, RECOMPUTED):
        with torch.no_grad():
            without = fused_linear_logprobs(**arguments, workspace_bytes=workspace_bytes)
        hidden = arguments["hidden_states"].clone().requires_grad_()
        found = fused_linear_logprobs(**(arguments | {"hidden_states": hidden}), workspace_bytes=workspace_bytes)
        assert torch.equal(found.logprobs, without.logprobs)


def test_one_model_alone():
    arguments = {name: x for name, x in layers().items() if not name.startswith("ref_")}
    found, exact = fused_linear_logprobs(**arguments), truth(arguments)
    torch.testing.assert_close(found.logprobs.double(), exact.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy.double(), exact.entropy, atol=1e-5, rtol=0)
    assert found.kl is found.ref_logprobs is found.ref_logsumexp is None


def test_a_reference_that_shares_the_output_layer():
    arguments = layers()
    del arguments["ref_lm_head_weight"], arguments["ref_lm_head_bias"]
    found, exact = fused_linear_logprobs(**arguments), truth(arguments)
    torch.testing.assert_close(found.kl.double(), exact.kl, atol=1e-5, rtol=0)
    arguments["lm_head_weight"].requires_grad_()
    fused_linear_logprobs(**arguments).kl.sum().backward()
    by_hand = {**arguments, "ref_lm_head_weight": arguments["lm_head_weight"].detach()}
    expected = all_kl_gradient(by_hand)
    torch.testing.assert_close(arguments["lm_head_weight"].grad.double(), expected, atol=1e-5, rtol=1e-4)


def all_kl_gradient(arguments):
    arguments = double(arguments)

    def kl(weight: Tensor) -> Tensor:
        changed = {**arguments, "lm_head_weight": weight, "ref_lm_head_bias": arguments["lm_head_bias"]}
        return definitions.fused_linear_logprobs(**changed, logits_dtype=torch.float64).kl.sum()

    return gradients(kl, arguments["lm_head_weight"].detach())[0]


@pytest.mark.parametrize("workspace_bytes", [KEPT, RECOMPUTED], ids=["kept", "recomputed"])
def test_a_frozen_output_layer_costs_no_gradient(workspace_bytes, monkeypatch):
    from rlhf.ops import linear

    asked = []
    original = linear.HeadGradient

    def recording(hidden, weight, needs, **options):
        asked.append(needs)
        return original(hidden, weight, needs, **options)

    monkeypatch.setattr(linear, "HeadGradient", recording)
    arguments = layers()
    arguments["hidden_states"].requires_grad_()
    fused_linear_logprobs(**arguments, workspace_bytes=workspace_bytes).logprobs.sum().backward()
    assert asked == [(True, False, False)]
    assert arguments["lm_head_weight"].grad is None
    assert (arguments["hidden_states"].grad != 0).any()


def test_padding_of_the_vocabulary_has_no_probability():
    arguments = layers(vocab=640)
    arguments["labels"].clamp_(max=599)
    found = fused_linear_logprobs(**arguments, valid_vocab_size=600)
    exact = truth(arguments, valid_vocab_size=600)
    for name in found._fields:
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), atol=1e-5, rtol=0)
    _, weight, bias = all_gradients(fused_linear_logprobs, arguments, valid_vocab_size=600)
    assert (weight[600:] == 0).all()
    assert (bias[600:] == 0).all()
    assert (weight[:600] != 0).any()


@pytest.mark.parametrize("workspace_bytes", [KEPT, SOME_KEPT, RECOMPUTED], ids=["kept", "some kept", "recomputed"])
def test_labels_that_a_bias_excludes(workspace_bytes):
    """Whole slices of the vocabulary among them, and more of the reference's than of the policy's."""
    arguments = layers(vocab=640)
    arguments["labels"].clamp_(max=99)
    arguments["lm_head_bias"][100:500] = -torch.inf
    arguments["ref_lm_head_bias"] = arguments["lm_head_bias"].clone()
    arguments["ref_lm_head_bias"][100:450] = 0.5
    found, exact = fused_linear_logprobs(**arguments, workspace_bytes=workspace_bytes), truth(arguments)
    for name in found._fields:
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), atol=1e-5, rtol=0)
    own = all_gradients(fused_linear_logprobs, arguments, workspace_bytes=workspace_bytes)
    true = all_gradients(definitions.fused_linear_logprobs, double(arguments), logits_dtype=torch.float64)
    for a, b in zip(own, true, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


def test_sixteen_bit_logits_are_worse_where_models_almost_agree():
    """Why logits are float32: rounding reads as KL."""
    arguments = layers(torch.bfloat16, tokens=(64,), vocab=3000, apart=1e-2)
    exact = truth(arguments).kl
    error = {
        dtype: ((fused_linear_logprobs(**arguments, logits_dtype=dtype).kl - exact).abs() / exact.mean()).max().item()
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert error[torch.float32] < 0.01 < 0.1 < error[torch.bfloat16]


def test_many_dimensions_and_no_tokens():
    arguments = layers(tokens=(2, 3))
    assert fused_linear_logprobs(**arguments).kl.shape == (2, 3)
    empty = layers(tokens=(0,))
    empty["hidden_states"].requires_grad_()
    found = fused_linear_logprobs(**empty)
    assert found.logprobs.shape == (0,)
    found.logprobs.sum().backward()


def test_two_runs_are_identical():
    runs = [all_gradients(fused_linear_logprobs, layers(vocab=3000), workspace_bytes=RECOMPUTED) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_under_autocast_it_computes_as_a_linear_layer_does():
    arguments = layers()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = fused_linear_logprobs(**arguments)
    rounded = {name: x.bfloat16() if x.is_floating_point() else x for name, x in arguments.items()}
    expected = fused_linear_logprobs(**rounded)
    assert torch.equal(found.kl, expected.kl)
    assert not torch.equal(found.kl, fused_linear_logprobs(**arguments).kl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head_weight": torch.zeros(700, 31)}, r"lm_head_weight: shape \(V, 32\) expected, \(700, 31\) received"),
        ({"lm_head_weight": torch.zeros(700, 32).bfloat16()}, "lm_head_weight: float32 on .* expected, as the hidden"),
        ({"lm_head_bias": torch.zeros(3)}, r"lm_head_bias: shape \(700,\) expected, \(3,\) received"),
        ({"ref_hidden_states": torch.zeros(8, 32)}, r"ref_hidden_states: shape \(9, 32\) expected, \(8, 32\) received"),
        (
            {"ref_lm_head_weight": torch.zeros(70, 32), "ref_lm_head_bias": None},
            "ref_lm_head_weight: 700 rows expected",
        ),
        ({"ref_lm_head_weight": None}, "ref_lm_head_bias: without ref_lm_head_weight"),
        ({"ref_hidden_states": None}, "ref_lm_head_weight, ref_lm_head_bias: without ref_hidden_states"),
        ({"logits_dtype": torch.float16}, "logits_dtype: float32 or float32 expected, float16 received"),
        ({"valid_vocab_size": 701}, r"valid_vocab_size: within \[1, 700\] expected, 701 received"),
        ({"hidden_states": torch.zeros(9, 32).double()}, "hidden_states: float32 or bfloat16 or float16 expected"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    change = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        fused_linear_logprobs(**(layers() | change))
