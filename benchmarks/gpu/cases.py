"""What is measured, against which ceiling, and what is wanted.

Ideal bytes are those that no implementation of the same two-level split can avoid: logits read once forward; read once
and their gradient written once backward. With hidden states, matrix products write float32 logits, and the kernels over
rows read them; products and kernels do not overlap, so a ceiling is their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu import peers, providers
from gpu.ceilings import Ceilings, Part
from gpu.providers import SMALL_WORKSPACE_BYTES, Outputs, Provider
from gpu.shapes import Linear, Logits, Shape
from rlhf.ops import LogprobOutput, definitions, ppo_loss
from rlhf.ops.heads import slice_columns

CHECKED_ROWS = 64


@dataclass(frozen=True)
class Bar:
    """One thing wanted of this project's operator; without a value it could not be measured."""

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def as_json(self) -> dict[str, Any]:
        bounds = {"at_least": self.at_least, "at_most": self.at_most}
        return {"name": self.name, "value": self.value, **bounds, "met": self.met}


Medians = dict[str, float]
"""ms by provider."""
Peaks = dict[str, int | None]
"""Bytes by provider, results included, inputs not."""


def _no_bars(shape: Shape, medians_ms: Medians, peaks: Peaks) -> list[Bar]:
    return []


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    of_logits: bool
    providers: Callable[[], list[Provider]]
    ceiling: Callable[[Ceilings, Shape], list[Part]]
    """Empty: none."""
    share: float | None
    """Of the ceiling, wanted."""
    loss: Callable[[LogprobOutput, Any, Tensor], Tensor] | None = None
    """What the gradients are of, of some rows; None: forward alone."""
    bars: Callable[[Shape, Medians, Peaks], list[Bar]] = field(default=_no_bars)
    """Beside the share."""


def truth(case: Case, x: Logits | Linear) -> tuple[Tensor, Outputs]:
    """Some rows, and by the definitions in float64 what they should be."""
    tokens = len(x.labels)
    rows = torch.linspace(0, tokens - 1, min(CHECKED_ROWS, tokens), device=x.labels.device).long()
    of = _exact_logits if isinstance(x, Logits) else _exact_linear
    leaf, found = of(x, rows)  # type: ignore[arg-type]
    assert found.kl is not None
    assert found.entropy is not None
    exact = {"logprobs": found.logprobs, "kl": found.kl, "entropy": found.entropy}
    exact = {name: values.detach() for name, values in exact.items()}
    if case.loss is not None:
        name = "gradient" if case.of_logits else "d_hidden"
        exact[name] = torch.autograd.grad(case.loss(found, x, rows), leaf)[0]
    return rows, exact


def errors(found: Outputs, rows: Tensor, exact: Outputs) -> dict[str, float]:
    """The largest absolute error by output; of gradients relative to the largest."""
    compared = {}
    for name in found.keys() & exact.keys():
        error = (found[name][rows].double() - exact[name]).abs().max().item()
        gradient = name in ("gradient", "d_hidden")
        scale = exact[name].abs().max().item() if gradient else 1.0
        compared[f"{name}, relative to the largest" if gradient else name] = error / max(scale, 1e-30)
    return dict(sorted(compared.items()))


def _exact_logits(x: Logits, rows: Tensor) -> tuple[Tensor, LogprobOutput]:
    leaf = x.logits[rows].double().requires_grad_()
    return leaf, definitions.logprobs_kl_from_logits(leaf, x.ref_logits[rows].double(), x.labels[rows])


def _exact_linear(x: Linear, rows: Tensor) -> tuple[Tensor, LogprobOutput]:
    leaf = x.hidden.detach()[rows].double().requires_grad_()
    return leaf, definitions.fused_linear_logprobs(
        leaf, x.weight.detach(), x.labels[rows], ref_hidden_states=x.ref_hidden[rows],
        ref_lm_head_weight=x.ref_weight, logits_dtype=torch.float64,
    )  # fmt: skip


def _of_logprobs(tokens: LogprobOutput, x: Logits | Linear, rows: Tensor) -> Tensor:
    return (x.g_logprobs[rows] * tokens.logprobs).sum()


def _of_both(tokens: LogprobOutput, x: Logits | Linear, rows: Tensor) -> Tensor:
    assert tokens.kl is not None
    return _of_logprobs(tokens, x, rows) + (x.g_kl[rows] * tokens.kl).sum()


def _of_ppo(tokens: LogprobOutput, x: Linear, rows: Tensor) -> Tensor:
    everywhere_mask = torch.ones_like(rows, dtype=torch.bool)
    return ppo_loss(tokens, x.old_logprobs[rows], x.advantages[rows], everywhere_mask, providers.TERMS)[0]


def _places(shape: Shape) -> float:
    return float(shape.tokens) * shape.vocab


def _forward_ceiling(ceilings: Ceilings, shape: Shape) -> list[Part]:
    return [ceilings.logits_product(2), ceilings.read(2 * 4 * _places(shape))]


def _train_ceiling(ceilings: Ceilings, shape: Shape) -> list[Part]:
    products = [ceilings.logits_product(1), ceilings.weight_gradient_product(), ceilings.hidden_gradient_product()]
    return [*products, ceilings.read(4 * _places(shape)), ceilings.copied((4 + 2) * _places(shape))]


def _ppo_ceiling(ceilings: Ceilings, shape: Shape) -> list[Part]:
    products = [ceilings.logits_product(2), ceilings.weight_gradient_product(), ceilings.hidden_gradient_product()]
    return [*products, ceilings.read(2 * 4 * _places(shape)), ceilings.copied((2 * 4 + 2) * _places(shape))]


def memory_formula_bytes(shape: Shape, workspace_bytes: int) -> int:
    """What `fused_linear_logprobs` says it takes backward, with two models' float32 logits, and the results."""
    tokens, hidden, vocab = shape.sizes
    place_bytes = 2 * 4 + 2
    columns = min(vocab, slice_columns(tokens, vocab, place_bytes, workspace_bytes))
    return place_bytes * tokens * columns + 4 * tokens * hidden + _results_bytes(shape)


def ppo_formula_bytes(shape: Shape, workspace_bytes: int) -> int:
    """What `fused_linear_ppo_loss` says it takes; its results appear when its workspace is free again."""
    tokens, hidden, vocab = shape.sizes
    row_bytes = vocab * (2 * 4 + 2)
    rows = min(tokens, max(16, workspace_bytes // row_bytes // 16 * 16))
    return 4 * tokens * hidden + 4 * vocab * hidden + max(rows * row_bytes, _results_bytes(shape))


def _results_bytes(shape: Shape) -> int:
    """Both gradients, bfloat16, and ten numbers a token."""
    tokens, hidden, vocab = shape.sizes
    return 2 * tokens * hidden + 2 * vocab * hidden + 40 * tokens


def _memory_bars(shape: Shape, medians_ms: Medians, peaks: Peaks) -> list[Bar]:
    times = _ratio(medians_ms.get("ours"), medians_ms.get("ours, logits kept"))
    less = _ratio(peaks.get("torch eager"), peaks.get("ours"))
    formula = _ratio(peaks.get("ours"), memory_formula_bytes(shape, SMALL_WORKSPACE_BYTES))
    return [
        Bar("time / time with the logits kept", times, at_most=1.6),
        Bar("peak memory, torch eager / ours", less, at_least=10),
        Bar("peak memory / the documented formula", formula, 0.95, 1.05),
    ]


def _ppo_bars(shape: Shape, medians_ms: Medians, peaks: Peaks) -> list[Bar]:
    formula = _ratio(peaks.get("ours, 2 GB"), ppo_formula_bytes(shape, SMALL_WORKSPACE_BYTES))
    return [Bar("workspace of 2 GB: peak memory / the documented formula", formula, 0.95, 1.05)]


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


CASES: Sequence[Case] = (
    Case(
        "logits, forward",
        "log-probs and entropy of one model",
        True,
        lambda: [*providers.logits_forward(), *peers.logits_forward()],
        lambda ceilings, shape: [ceilings.read(2 * _places(shape))],
        0.90,
    ),
    Case(
        "logits, forward with KL",
        "log-probs of both models, exact KL, entropy",
        True,
        providers.logits_kl_forward,
        lambda ceilings, shape: [ceilings.read(2 * 2 * _places(shape))],
        0.90,
    ),
    Case(
        "logits, backward",
        "the gradient of log-probs, in place",
        True,
        providers.logits_backward,
        lambda ceilings, shape: [ceilings.copied(2 * 2 * _places(shape))],
        0.90,
        _of_logprobs,
    ),
    Case(
        "logits, backward with KL",
        "the gradient of log-probs and exact KL, in place",
        True,
        providers.logits_kl_backward,
        lambda ceilings, shape: [ceilings.copied(3 * 2 * _places(shape))],
        0.90,
        _of_both,
    ),
    Case(
        "hidden states, forward with KL",
        "log-probs of both models, exact KL, entropy",
        False,
        lambda: [*providers.linear_forward(), *peers.linear_forward()],
        _forward_ceiling,
        0.90,
    ),
    Case(
        "hidden states, forward and backward",
        "log-probs of the policy and both gradients",
        False,
        lambda: [*providers.linear_train(), *peers.linear_train()],
        _train_ceiling,
        0.90,
        _of_logprobs,
    ),
    Case(
        "hidden states, PPO",
        "PPO's loss with reference and exact KL, and both gradients",
        False,
        lambda: [*providers.linear_ppo(), *peers.linear_ppo()],
        _ppo_ceiling,
        0.88,
        _of_ppo,
        _ppo_bars,
    ),
    Case(
        "hidden states, in 2 GB",
        "log-probs, exact KL and both gradients within a workspace of 2 GB",
        False,
        providers.linear_memory,
        lambda ceilings, shape: [],
        None,
        _of_both,
        _memory_bars,
    ),
)
