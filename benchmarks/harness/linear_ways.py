"""The ways of `linear.py`; run as a module, one of them once, in a process that does nothing else.

python -m harness.linear_ways NAME TOKENS VOCABULARY HIDDEN
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.machine import peak_rss_mib, reset_peak_rss, rss_mib
from rlhf.ops import LogprobOutput, PpoLossOutput, PpoTerms, fused_linear_logprobs, fused_linear_ppo_loss, ppo_loss

TERMS = PpoTerms()


@dataclass(frozen=True)
class Batch:
    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    labels: Tensor
    old_logprobs: Tensor
    advantages: Tensor


def batch(tokens: int, vocab: int, hidden: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=random)
    weight = torch.randn(vocab, hidden, generator=random).mul_(hidden**-0.5)
    labels = torch.randint(vocab, (tokens,), generator=random)
    advantages = torch.randn(tokens, generator=random)
    # About the log-probs, so that some ratios are clipped and others not.
    old = (states * weight[labels]).sum(-1) - torch.tensor(vocab).log() - 0.5 + 0.3 * advantages.roll(1)
    return Batch(states.requires_grad_(), weight.requires_grad_(), labels, old, advantages)


def log_softmax_of_all(x: Batch) -> Tensor:
    logits = x.hidden @ x.weight.T
    return torch.log_softmax(logits, -1).gather(-1, x.labels.unsqueeze(-1)).squeeze(-1)


def fused(x: Batch) -> Tensor:
    return fused_linear_logprobs(x.hidden, x.weight, x.labels).logprobs


def _forward(logprobs: Callable[[Batch], Tensor]) -> Callable[[Batch], list[Tensor]]:
    def run(x: Batch) -> list[Tensor]:
        with torch.no_grad():
            return [logprobs(x)]

    return run


def _train(logprobs: Callable[[Batch], Tensor]) -> Callable[[Batch], list[Tensor]]:
    def run(x: Batch) -> list[Tensor]:
        tokens, everywhere_mask = LogprobOutput(logprobs(x)), torch.ones_like(x.labels, dtype=torch.bool)
        return _gradients(ppo_loss(tokens, x.old_logprobs, x.advantages, everywhere_mask, TERMS)[0], x)

    return run


def _fused_forward(x: Batch) -> list[Tensor]:
    with torch.no_grad():
        return [_fused_ppo(x).tokens.logprobs]


def _fused_train(x: Batch) -> list[Tensor]:
    return _gradients(_fused_ppo(x).loss, x)


def _fused_ppo(x: Batch) -> PpoLossOutput:
    return fused_linear_ppo_loss(x.hidden, x.weight, x.labels, x.old_logprobs, x.advantages, terms=TERMS)


def _gradients(loss: Tensor, x: Batch) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (x.hidden, x.weight))]


WAYS: dict[str, Callable[[Batch], list[Tensor]]] = {
    "forward: log_softmax of all logits": _forward(log_softmax_of_all),
    "forward: fused_linear_logprobs": _forward(fused),
    "forward: fused_linear_ppo_loss": _fused_forward,
    "forward and backward: log_softmax of all logits": _train(log_softmax_of_all),
    "forward and backward: fused_linear_logprobs": _train(fused),
    "forward and backward: fused_linear_ppo_loss": _fused_train,
}
"""By stage and name."""


def main() -> None:
    name, *sizes = sys.argv[1:]
    tokens, vocab, hidden = map(int, sizes)
    way = WAYS[name]
    torch.set_num_threads(1)
    way(batch(16, 64, 16))  # what is loaded and made on first use
    inputs = batch(tokens, vocab, hidden)
    reset_peak_rss()
    before_mib, began_s = rss_mib(os.getpid()), time.perf_counter()
    found = way(inputs)
    seconds = time.perf_counter() - began_s
    peak_mib = peak_rss_mib(os.getpid()) - before_mib
    # Of the last: the log-probs, or the output layer's gradient.
    total = float(found[-1].double().abs().sum())
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib, "sum": total}))


if __name__ == "__main__":
    main()
