"""This project's operators, and the same computation in plain torch and through torch.compile.

A provider's `prepare` gets one set of inputs and returns what is timed; that returns what can be checked: log-probs,
KL, gradients, each with the tokens first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.shapes import Linear, Logits
from rlhf.ops import (
    LogprobOutput,
    PpoTerms,
    definitions,
    fused_linear_logprobs,
    fused_linear_ppo_loss,
    logprobs_from_logits,
    logprobs_kl_from_logits,
    ppo_loss,
)

TERMS = PpoTerms(kl_coef=0.1, kl_estimator="exact")
SMALL_WORKSPACE_BYTES = 2 * 10**9

Outputs = dict[str, Tensor]
Timed = Callable[[], Outputs]
OneModel = Callable[[Tensor, Tensor], LogprobOutput]
"""Of logits and labels."""
TwoModels = Callable[[Tensor, Tensor, Tensor], LogprobOutput]
"""Of logits, the reference's, and labels."""


@dataclass(frozen=True)
class Provider:
    name: str
    prepare: Callable[[Any], Timed]
    note: str = ""
    """What it does otherwise than this project's operator."""


def roomy_bytes(x: Linear) -> int:
    """A workspace in which the logits of both models and the gradient lie whole."""
    return len(x.hidden) * (len(x.weight) + 128) * (4 + 4 + 2)


# --- logits


def log_softmax_and_gather(logits: Tensor, labels: Tensor) -> LogprobOutput:
    """As most trainers write it."""
    return LogprobOutput(torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1))


def _with_entropy(function: Any) -> OneModel:
    return lambda logits, labels: function(logits, labels, return_entropy=True)


def _in_place(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> LogprobOutput:
    return logprobs_kl_from_logits(logits, ref_logits, labels, inplace_backward=True)


def _forward(function: OneModel, x: Logits) -> Timed:
    def run() -> Outputs:
        with torch.no_grad():
            return _found(function(x.logits, x.labels))

    return run


def _kl_forward(function: TwoModels, x: Logits) -> Timed:
    def run() -> Outputs:
        with torch.no_grad():
            return _found(function(x.logits, x.ref_logits, x.labels))

    return run


def _backward(function: OneModel, x: Logits) -> Timed:
    logits = x.logits.clone().requires_grad_()
    tokens = function(logits, x.labels)
    return lambda: {"gradient": torch.autograd.grad(tokens.logprobs, logits, x.g_logprobs)[0]}


def _kl_backward(function: TwoModels, x: Logits) -> Timed:
    logits = x.logits.clone().requires_grad_()
    tokens = function(logits, x.ref_logits, x.labels)
    return lambda: {"gradient": torch.autograd.grad(_both(tokens), logits, (x.g_logprobs, x.g_kl))[0]}


def _own_backward(x: Logits) -> Timed:
    """In place is the operator with a reference; where the loss does not depend on KL, it is not read."""
    return _backward(lambda logits, labels: _in_place(logits, x.ref_logits, labels), x)


def logits_forward() -> list[Provider]:
    eager = _with_entropy(definitions.logprobs_from_logits)
    return [
        Provider("ours", functools.partial(_forward, _with_entropy(logprobs_from_logits))),
        Provider("torch eager", functools.partial(_forward, eager)),
        Provider("torch.compile", _compiled(_forward, eager)),
        Provider("log_softmax, gather", functools.partial(_forward, log_softmax_and_gather), "no entropy"),
    ]


def logits_kl_forward() -> list[Provider]:
    eager = definitions.logprobs_kl_from_logits
    return [
        Provider("ours", functools.partial(_kl_forward, logprobs_kl_from_logits)),
        Provider("torch eager", functools.partial(_kl_forward, eager)),
        Provider("torch.compile", _compiled(_kl_forward, eager)),
    ]


def logits_backward() -> list[Provider]:
    return [
        Provider("ours", _own_backward),
        Provider("torch eager", functools.partial(_backward, log_softmax_and_gather), "not in place"),
        Provider("torch.compile", _compiled(_backward, log_softmax_and_gather), "not in place"),
    ]


def logits_kl_backward() -> list[Provider]:
    eager = definitions.logprobs_kl_from_logits
    return [
        Provider("ours", functools.partial(_kl_backward, _in_place)),
        Provider("torch eager", functools.partial(_kl_backward, eager), "not in place"),
        Provider("torch.compile", _compiled(_kl_backward, eager), "not in place"),
    ]


# --- hidden states


def plain(x: Linear, hidden: Tensor, weight: Tensor) -> LogprobOutput:
    """Both models' logits as a model gives them, bfloat16; log-probs, entropy and exact KL in float32."""
    logits, ref_logits = hidden @ weight.T, x.ref_hidden @ x.ref_weight.T
    return definitions.logprobs_kl_from_logits(logits, ref_logits, x.labels)


def plain_policy(x: Linear, hidden: Tensor, weight: Tensor) -> LogprobOutput:
    return log_softmax_and_gather(hidden @ weight.T, x.labels)


def ours(x: Linear, hidden: Tensor, weight: Tensor, **settings: Any) -> LogprobOutput:
    return fused_linear_logprobs(
        hidden, weight, x.labels, ref_hidden_states=x.ref_hidden, ref_lm_head_weight=x.ref_weight, **settings
    )


def _linear_forward(function: Any, x: Linear) -> Timed:
    def run() -> Outputs:
        with torch.no_grad():
            return _found(function(x, x.hidden, x.weight))

    return run


def _train(function: Any, x: Linear) -> Timed:
    def run() -> Outputs:
        tokens = function(x, x.hidden, x.weight)
        return _found(tokens) | gradients(tokens.logprobs, x, x.g_logprobs)

    return run


def _train_with_kl(function: Any, x: Linear) -> Timed:
    def run() -> Outputs:
        tokens = function(x, x.hidden, x.weight)
        return _found(tokens) | gradients(_both(tokens), x, (x.g_logprobs, x.g_kl))

    return run


def _ppo(function: Any, x: Linear) -> Timed:
    def run() -> Outputs:
        tokens = function(x, x.hidden, x.weight)
        everywhere_mask = torch.ones_like(x.labels, dtype=torch.bool)
        loss, _ = ppo_loss(tokens, x.old_logprobs, x.advantages, everywhere_mask, TERMS)
        return _found(tokens) | gradients(loss, x)

    return run


def _own_ppo(workspace_bytes: Callable[[Linear], int], x: Linear) -> Timed:
    def run() -> Outputs:
        found = fused_linear_ppo_loss(
            x.hidden, x.weight, x.labels, x.old_logprobs, x.advantages, terms=TERMS, ref_hidden_states=x.ref_hidden,
            ref_lm_head_weight=x.ref_weight, workspace_bytes=workspace_bytes(x),
        )  # fmt: skip
        return _found(found.tokens) | gradients(found.loss, x)

    return run


def _policy_only(x: Linear, hidden: Tensor, weight: Tensor) -> LogprobOutput:
    return fused_linear_logprobs(hidden, weight, x.labels, workspace_bytes=roomy_bytes(x))


def _roomy(x: Linear, hidden: Tensor, weight: Tensor) -> LogprobOutput:
    return ours(x, hidden, weight, workspace_bytes=roomy_bytes(x))


def _small(x: Linear, hidden: Tensor, weight: Tensor) -> LogprobOutput:
    return ours(x, hidden, weight, workspace_bytes=SMALL_WORKSPACE_BYTES)


def _small_workspace(x: Linear) -> int:
    return SMALL_WORKSPACE_BYTES


def linear_forward() -> list[Provider]:
    return [
        Provider("ours", functools.partial(_linear_forward, ours)),
        Provider("torch eager", functools.partial(_linear_forward, plain), "bfloat16 logits"),
        Provider("torch.compile", _compiled(_linear_forward, plain), "bfloat16 logits"),
    ]


def linear_train() -> list[Provider]:
    return [
        Provider("ours", functools.partial(_train, _policy_only), "the logits are kept"),
        Provider("torch eager", functools.partial(_train, plain_policy), "bfloat16 logits; no entropy"),
        Provider("torch.compile", _compiled(_train, plain_policy), "bfloat16 logits; no entropy"),
    ]


def linear_ppo() -> list[Provider]:
    return [
        Provider("ours", functools.partial(_own_ppo, roomy_bytes), "one slice of tokens"),
        Provider("ours, 2 GB", functools.partial(_own_ppo, _small_workspace), "workspace of 2 GB"),
        Provider("torch eager", functools.partial(_ppo, plain), "bfloat16 logits"),
        Provider("torch.compile", _compiled(_ppo, plain), "bfloat16 logits"),
    ]


def linear_memory() -> list[Provider]:
    return [
        Provider("ours", functools.partial(_train_with_kl, _small), "workspace of 2 GB"),
        Provider("ours, logits kept", functools.partial(_train_with_kl, _roomy), "the schedule for speed"),
        Provider("torch eager", functools.partial(_train_with_kl, plain), "bfloat16 logits"),
    ]


def gradients(outputs: Any, x: Linear, upstream: Any = None) -> Outputs:
    d_hidden, d_weight = torch.autograd.grad(outputs, (x.hidden, x.weight), upstream)
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def _both(tokens: LogprobOutput) -> tuple[Tensor, Tensor]:
    assert tokens.kl is not None
    return tokens.logprobs, tokens.kl


def _found(tokens: LogprobOutput) -> Outputs:
    named = {"logprobs": tokens.logprobs, "kl": tokens.kl, "entropy": tokens.entropy}
    return {name: values.detach() for name, values in named.items() if values is not None}


def _compiled(prepare: Callable[[Any, Any], Timed], function: Any) -> Callable[[Any], Timed]:
    """Compiled when it first runs; on a CPU only traced, since nothing is measured there."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return functools.partial(prepare, torch.compile(function, dynamic=False, backend=backend))
