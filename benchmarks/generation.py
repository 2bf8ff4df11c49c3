"""How many tokens a second does the policy service give, against plain `transformers` `generate`?

Three ways through the same 512 prompts with the same response lengths, on one thread each, taken in turn:

- service: a `rlhf policy` process over gRPC, 64 calls in flight; log-probs included.
- engine: the same engine in this process, without gRPC.
- transformers: `generate` in batches of 64 in order of arrival, left-padded. A batch ends with its longest row, as it
  must; a row counts its own tokens only. No log-probs are asked for.

Then the service alone, open loop: Poisson arrivals at shares of the rate that it managed above.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from harness.bench import Figure, Measured, Options, expect_equal, interleaved, main, percentile, say, scratch
from harness.load import Load, closed_loop, open_loop
from harness.model import MAX_NEW_TOKENS, MEAN_NEW_TOKENS, PROMPT_TOKENS, Ask, asks, make_model
from harness.servers import policy_service
from rlhf.models.causal import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import Engine, Finished, GenerationRequest
from rlhf.wire.records import Sampling, Stopping, WeightVersion

THREADS = 1
IN_FLIGHT = 64
LOADS = (0.25, 0.5, 0.75, 0.9)


def measure(options: Options) -> Measured:
    count, repeats = options.size(512, 12), options.size(5, 2)
    in_flight = options.size(IN_FLIGHT, 4)
    torch.set_num_threads(THREADS)
    with scratch() as folder:
        parameters = make_model(folder / "model", quick=options.quick)
        model = load_causal_lm(folder / "model")
        # `generate` takes the model's own where the configuration given to it has None.
        model.generation_config.eos_token_id = None
        asked = asks(count, vocab_size=model.config.vocab_size, longest=options.size(MAX_NEW_TOKENS, 12))
        engine = _engine(model, folder / "model", in_flight)
        # Under a load, so that the first time counts for none.
        first = asked[:in_flight]
        expect_equal(
            "tokens of the first batch",
            engine=through_engine(engine, first, in_flight).tokens,
            transformers=through_transformers(model, first, in_flight).tokens,
            asked=sum(ask.new_tokens for ask in first),
        )
        with policy_service(folder / "model", folder / "policy.log", threads=THREADS) as policy:
            closed_loop(policy.address, asked[:in_flight], in_flight)
            ways = {
                "service": lambda: closed_loop(policy.address, asked, in_flight),
                "transformers": lambda: through_transformers(model, asked, in_flight),
                "engine": lambda: through_engine(engine, asked, in_flight),
                "streaming": lambda: closed_loop(policy.address, asked, in_flight, streamed=True),
            }
            found = interleaved(ways, repeats)
            tokens = {way: loads[0].tokens for way, loads in found.items()}
            expect_equal("tokens", **tokens, asked=sum(ask.new_tokens for ask in asked))
            capacity_per_s = count / percentile([load.seconds for load in found["service"]], 0.5)
            under_load = _open_loop(options, policy.address, model.config.vocab_size, capacity_per_s)
    setup = {
        "parameters": parameters,
        "requests": count,
        "in_flight": in_flight,
        "prompt_tokens": PROMPT_TOKENS,
        "mean_new_tokens": MEAN_NEW_TOKENS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "dtype": "float32",
        "seed": 0,
    }
    threads = {"policy": THREADS, "engine": THREADS, "transformers": THREADS}
    return Measured([*_closed_figures(found), *under_load], setup, threads, {"tokens": tokens})


def through_engine(engine: Engine, asked: Sequence[Ask], in_flight: int) -> Load:
    """The engine alone, kept as full as the service is."""
    waiting = iter(asked)
    began_s = time.perf_counter()
    engine.submit([_request(ask) for _, ask in zip(range(in_flight), waiting, strict=False)])
    tokens, left = 0, len(asked)
    while left:
        finished = [event for event in engine.step() if isinstance(event, Finished)]
        left -= len(finished)
        tokens += sum(len(event.token_ids) for event in finished)
        engine.submit([_request(ask) for _, ask in zip(finished, waiting, strict=False)])
    return Load(time.perf_counter() - began_s, tokens)


def through_transformers(model: PreTrainedModel, asked: Sequence[Ask], in_flight: int) -> Load:
    """`generate`, a batch after the other."""
    began_s = time.perf_counter()
    tokens = 0
    for first in range(0, len(asked), in_flight):
        tokens += _generate(model, asked[first : first + in_flight])
    return Load(time.perf_counter() - began_s, tokens)


def _generate(model: PreTrainedModel, batch: Sequence[Ask]) -> int:
    width = max(len(ask.prompt) for ask in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, ask in enumerate(batch):
        ids[row, width - len(ask.prompt) :] = torch.from_numpy(ask.prompt)
        mask[row, width - len(ask.prompt) :] = 1
    lengths = torch.tensor([ask.new_tokens for ask in batch])
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, top_k=0, max_new_tokens=int(lengths.max()), pad_token_id=0, eos_token_id=None, use_cache=True
    )
    stopping = StoppingCriteriaList([_OwnLength(width, lengths)])
    with torch.inference_mode():
        answer: Any = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stopping
        )
    made = torch.full_like(lengths, answer.shape[1] - width)
    return int(torch.minimum(made, lengths).sum())


class _OwnLength(StoppingCriteria):
    """A row is done at its own length; `generate` ends when all are."""

    def __init__(self, prompt_width: int, lengths: Tensor) -> None:
        self._ends = prompt_width + lengths

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return input_ids.shape[1] >= self._ends


def _engine(model: PreTrainedModel, folder: Path, in_flight: int) -> Engine:
    return ContinuousEngine(model, load_tokenizer(folder), WeightVersion("", 0, 0, ""), Limits(max_sequences=in_flight))


def _request(ask: Ask) -> GenerationRequest:
    stopping = Stopping(max_new_tokens=ask.new_tokens, ignore_eos=True)
    return GenerationRequest(ask.seed, ask.prompt, ask.seed, Sampling(), stopping)


def _closed_figures(found: dict[str, list[Load]]) -> list[Figure]:
    rates = {way: [load.tokens_per_s for load in loads] for way, loads in found.items()}
    pairs = zip(rates["service"], rates["transformers"], strict=True)
    own = zip(rates["service"], rates["engine"], strict=True)
    latencies = [load.latencies_s for load in found["service"]]
    return [
        Figure("policy service, 64 in flight", "tokens/s", rates["service"], headline=True),
        Figure("transformers generate, batches of 64", "tokens/s", rates["transformers"], headline=True),
        Figure("policy service / transformers generate", "×", [a / b for a, b in pairs], at_least=2, headline=True),
        Figure("engine without gRPC", "tokens/s", rates["engine"], headline=True),
        Figure("policy service / engine", "×", [a / b for a, b in own]),
        Figure("policy service, every token streamed", "tokens/s", rates["streaming"]),
        Figure("latency p50, 64 in flight", "s", [percentile(one, 0.5) for one in latencies]),
        Figure("latency p95, 64 in flight", "s", [percentile(one, 0.95) for one in latencies]),
    ]


def _open_loop(options: Options, address: str, vocab_size: int, capacity_per_s: float) -> list[Figure]:
    count, repeats = options.size(256, 8), options.size(3, 2)
    figures = []
    seeds = iter(range(1, 1 + repeats * len(LOADS)))

    def one(share: float) -> Load:
        seed = next(seeds)
        asked = asks(count, vocab_size=vocab_size, seed=seed, longest=options.size(MAX_NEW_TOKENS, 12))
        return open_loop(address, asked, share * capacity_per_s, seed=seed)

    found = interleaved({f"{share:.0%}": partial(one, share) for share in LOADS}, repeats)
    for share, loads in found.items():
        at = f"open loop at {share} of capacity"
        per_s = [len(load.answers) / load.seconds for load in loads]
        figures += [
            Figure(f"{at}: answered", "requests/s", per_s),
            Figure(f"{at}: throughput", "tokens/s", [load.tokens_per_s for load in loads]),
            *_percentiles(f"{at}: latency", [load.latencies_s for load in loads], headline=share == "90%"),
            *_percentiles(f"{at}: time to first token", [load.first_tokens_s for load in loads]),
        ]
    say(f"  capacity {capacity_per_s:.1f} requests/s")
    return figures


def _percentiles(name: str, runs: Sequence[Sequence[float]], headline: bool = False) -> list[Figure]:
    return [
        Figure(f"{name} p{share:.0f}", "s", [percentile(one, share / 100) for one in runs], headline=headline)
        for share in (50.0, 95.0)
    ]


if __name__ == "__main__":
    main("generation", "How many tokens a second does the policy service give, against plain transformers?", measure)
