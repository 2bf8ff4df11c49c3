"""What do a second replica and a larger batch bring?

- replicas: the same requests from one client over one channel, to one and to two `rlhf policy` processes of one thread
  each, in turn. 128 calls are in flight both times: two replicas decode 64 each, one decodes 64 while 64 wait. The
  client is a third process; what it computes is taken from the same cores, and is shown.
- batch: the engine in this process, B sequences of equal length from start to end.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from harness.bench import Figure, Measured, Options, expect_equal, interleaved, main, scratch
from harness.load import Load, closed_loop
from harness.machine import cpu_s
from harness.model import asks, make_model
from harness.servers import policy_service
from rlhf.models.causal import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import GenerationRequest
from rlhf.wire.records import Sampling, Stopping, WeightVersion

THREADS = 1
IN_FLIGHT = 128
BATCHES = (1, 2, 4, 8, 16, 32, 64)
BATCH_PROMPT_TOKENS, BATCH_NEW_TOKENS = 16, 96


def measure(options: Options) -> Measured:
    count = options.size(512, 12)
    torch.set_num_threads(THREADS)
    with scratch() as folder:
        parameters = make_model(folder / "model", quick=options.quick)
        figures, tokens = _replicas(options, folder, count)
        figures += _batches(options, folder / "model")
    setup = {
        "parameters": parameters,
        "requests": count,
        "in_flight": IN_FLIGHT,
        "batch_prompt_tokens": BATCH_PROMPT_TOKENS,
        "batch_new_tokens": options.size(BATCH_NEW_TOKENS, 4),
        "dtype": "float32",
        "seed": 0,
    }
    return Measured(figures, setup, {"each policy": THREADS, "engine": THREADS}, {"tokens": tokens})


def _replicas(options: Options, folder: Path, count: int) -> tuple[list[Figure], dict[str, int]]:
    asked = asks(count, vocab_size=_vocab_size(folder / "model"), longest=options.size(192, 12))
    first = policy_service(folder / "model", folder / "policy-0.log", threads=THREADS)
    second = policy_service(folder / "model", folder / "policy-1.log", threads=THREADS)
    with first as one, second as two:
        both = f"{one.address},{two.address}"
        closed_loop(both, asked, IN_FLIGHT)
        ways = {"1 replica": lambda: _watched(one.address), "2 replicas": lambda: _watched(both)}

        def _watched(addresses: str) -> tuple[Load, float]:
            began_s = cpu_s(os.getpid())
            load = closed_loop(addresses, asked, IN_FLIGHT)
            return load, (cpu_s(os.getpid()) - began_s) / load.seconds

        found = interleaved(ways, options.size(5, 2))
    tokens = {way: runs[0][0].tokens for way, runs in found.items()}
    expect_equal("tokens", **tokens)
    rates = {way: [load.tokens_per_s for load, _ in runs] for way, runs in found.items()}
    pairs = zip(rates["2 replicas"], rates["1 replica"], strict=True)
    return [
        *(Figure(way, "tokens/s", values, headline=True) for way, values in rates.items()),
        Figure("2 replicas / 1 replica", "×", [a / b for a, b in pairs], headline=True),
        *(Figure(f"{way}: the client's cores", "cores", [cores for _, cores in runs]) for way, runs in found.items()),
    ], tokens


def _batches(options: Options, folder: Path) -> list[Figure]:
    model, new_tokens = load_causal_lm(folder), options.size(BATCH_NEW_TOKENS, 4)
    engine = ContinuousEngine(model, load_tokenizer(folder), WeightVersion("", 0, 0, ""), Limits())
    prompt = asks(1, vocab_size=model.config.vocab_size)[0].prompt[:1].repeat(BATCH_PROMPT_TOKENS)
    request = GenerationRequest(0, prompt, 0, Sampling(), Stopping(max_new_tokens=new_tokens, ignore_eos=True))

    def one(size: int) -> float:
        engine.submit([replace(request, id=n, seed=n, prompt=prompt.copy()) for n in range(size)])
        engine.step()
        began_s = time.perf_counter()
        while engine.load.running:
            engine.step()
        return size * (new_tokens - 1) / (time.perf_counter() - began_s)

    one(max(BATCHES))
    found = interleaved({f"batch of {size}": partial(one, size) for size in BATCHES}, options.size(5, 2))
    return [
        Figure(f"engine, {name}", "tokens/s", rates, headline=name in ("batch of 1", "batch of 64"))
        for name, rates in found.items()
    ]


def _vocab_size(folder: Path) -> int:
    return len(load_tokenizer(folder))


if __name__ == "__main__":
    main("scaling", "What do a second replica and a larger batch bring?", measure)
