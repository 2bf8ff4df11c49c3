from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.errors import RequestError
from rlhf.ops import logprobs_from_logits
from rlhf.policy.requests import check_sampling
from rlhf.policy.sampler import Sampler, SamplerRow, filtered, pick, uniforms
from rlhf.wire.records import LogprobMode, Sampling, Stopping

V = 300  # more than one block of `pick`
NONE = np.empty(0, dtype=np.int32)


def row(seed: int = 0, mode: LogprobMode = LogprobMode.TEMPERATURE, **sampling: Any) -> SamplerRow:
    return SamplerRow(seed, Sampling(**sampling), mode, 0, frozenset())


def sample(logits: Tensor, rows: list[SamplerRow], step: int = 0, present: Any = None) -> tuple[Tensor, Tensor]:
    sampler = Sampler(rows, present or [NONE] * len(rows), logits.shape[1], "cpu")
    return sampler.sample(logits, np.full(len(rows), step))


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf]).repeat(20_000, 1)
    tokens, _ = sample(logits, [row(seed) for seed in range(20_000)])
    shares = torch.bincount(tokens, minlength=5) / 20_000
    # Four standard errors of a share are 4·sqrt(0.25 / 20000) = 0.014.
    assert torch.allclose(shares, torch.softmax(logits[0], -1), atol=0.015)
    assert shares[4] == 0


def test_steps_of_one_seed_are_independent_draws() -> None:
    u = uniforms(np.full(20_000, 7, dtype=np.uint64), np.arange(20_000))
    assert np.abs(np.histogram(u, bins=10, range=(0, 1))[0] / 20_000 - 0.1).max() < 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


def test_a_row_does_not_see_its_neighbours() -> None:
    logits = logits_of(8)
    rows = [row(seed, temperature=0.5 + seed / 4, top_k=3 * (seed % 2)) for seed in range(8)]
    tokens, logprobs = sample(logits, rows, step=5)
    order = [6, 1, 3]
    fewer, fewer_logprobs = sample(logits[order], [rows[i] for i in order], step=5)
    assert fewer.tolist() == tokens[order].tolist()
    assert torch.allclose(fewer_logprobs, logprobs[order], atol=1e-6)


def test_another_step_or_seed_is_another_number() -> None:
    seeds = np.array([0, 0, 1, 2**64 - 1], dtype=np.uint64)
    assert len(set(uniforms(seeds, np.array([0, 1, 0, 0])).tolist())) == 4


@pytest.mark.parametrize("mode", [LogprobMode.RAW, LogprobMode.TEMPERATURE])
def test_logprobs_are_the_definition(mode: LogprobMode) -> None:
    logits, temperature = logits_of(16), 0.7
    tokens, logprobs = sample(logits, [row(seed, mode, temperature=temperature, top_p=0.9) for seed in range(16)])
    expected = logprobs_from_logits(logits, tokens, temperature if mode is LogprobMode.TEMPERATURE else 1.0)
    assert torch.allclose(logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_rows_with_different_modes_share_a_batch() -> None:
    logits = logits_of(4)
    modes = [LogprobMode.RAW, LogprobMode.TEMPERATURE, LogprobMode.PROCESSED, LogprobMode.RAW]
    rows = [row(i, mode, temperature=0.5, top_k=4) for i, mode in enumerate(modes)]
    tokens, logprobs = sample(logits, rows)
    for i, mode in enumerate(modes):
        _, alone = sample(logits[i : i + 1], [rows[i]])
        assert logprobs[i] == pytest.approx(alone.item(), abs=1e-6), mode
    assert logprobs[2] > logprobs_from_logits(logits[2], tokens[2], 0.5).logprobs


def test_greedy_takes_the_most_likely_with_raw_logprob() -> None:
    logits = logits_of(5)
    tokens, logprobs = sample(logits, [row(temperature=0) for _ in range(5)])
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(logprobs, logprobs_from_logits(logits, tokens).logprobs, atol=1e-6)


def kept_naively(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The definition of the three filters, one after the other, with plain loops."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = {i: float(np.exp(logits[i])) for i in order}
    total, before, kept = sum(weights.values()), 0.0, set()
    for i in order:
        if before < top_p * total or top_p == 1:
            kept.add(i)
        before += weights[i]
    return {i for i in kept if weights[i] >= min_p * weights[order[0]]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_filters_keep_what_the_definition_keeps(tenths: list[int], top_k: int, top_p: float, min_p: float) -> None:
    logits = [value / 10 + 0.001 * value**2 for value in tenths]
    out = filtered(
        torch.tensor([logits]), torch.tensor([[top_k or 99]]), torch.tensor([[top_p]]), torch.tensor([[min_p]])
    )
    kept = set(torch.isfinite(out[0]).nonzero()[:, 0].tolist())
    assert kept == kept_naively(logits, top_k, top_p, min_p)
    assert all(out[0, i] == torch.tensor(logits[i]) for i in kept)


def test_processed_logprob_is_of_the_filtered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    tokens, logprobs = sample(logits, [row(3, LogprobMode.PROCESSED, top_k=2)])
    expected = torch.log_softmax(torch.tensor([2.0, 1.0]), -1)[tokens[0]]
    assert logprobs[0] == pytest.approx(expected.item(), abs=1e-6)


def test_repetition_penalty_counts_prompt_and_samples() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    sampler = Sampler([row(temperature=0, repetition_penalty=2.0)], [np.array([0], dtype=np.int32)], 4, "cpu")
    picked = [sampler.sample(logits, np.array([step]))[0].item() for step in range(3)]
    # 0 is in the prompt: 2 -> 1 < 1.5. Then 1 was sampled: 1.5 -> 0.75 < 1. Negative logits are multiplied.
    assert picked == [1, 0, 0]
    pushed = Sampler([row(temperature=0, repetition_penalty=2.0)], [np.array([2], dtype=np.int32)], 4, "cpu")
    assert pushed.sample(torch.tensor([[-9.0, -9.0, -1.0, -1.2]]), np.array([0]))[0].item() == 3


def test_end_tokens_wait_for_min_new_tokens() -> None:
    logits = torch.tensor([[5.0, 0.0, 1.0]])
    early = SamplerRow(0, Sampling(temperature=0), LogprobMode.TEMPERATURE, 2, frozenset({0}))
    sampler = Sampler([early], [NONE], 3, "cpu")
    assert [sampler.sample(logits, np.array([step]))[0].item() for step in range(3)] == [2, 2, 0]


def test_each_row_counts_its_own_steps() -> None:
    logits = torch.tensor([[5.0, 0.0, 1.0]]).repeat(3, 1)
    early = SamplerRow(0, Sampling(temperature=0), LogprobMode.TEMPERATURE, 2, frozenset({0}))
    sampler = Sampler([row(temperature=0), early, early], [NONE] * 3, 3, "cpu")
    assert sampler.sample(logits, np.array([0, 9, 1]))[0].tolist() == [0, 0, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.25, 3.0]), min_size=1, max_size=400), st.floats(0, 1))
def test_pick_never_takes_what_has_no_probability(weights: list[float], u: float) -> None:
    weights[0] = max(weights[0], 0.5)
    p = torch.tensor([weights])
    taken = int(pick(p, torch.tensor([min(u, 1 - 2.0**-52)], dtype=torch.float64)))
    assert p[0, taken] > 0


def test_pick_inverts_the_cumulative_distribution_across_blocks() -> None:
    p = torch.softmax(logits_of(1), -1)
    cumulative = p[0].double().cumsum(0)
    middles = cumulative - p[0].double() / 2
    found = pick(p.expand(V, -1), middles / cumulative[-1])
    assert found.tolist() == list(range(V))


def test_a_row_without_numbers_says_so_and_spares_the_others() -> None:
    logits = logits_of(2)
    logits[0] = torch.nan
    tokens, logprobs = sample(logits, [row(0), row(1)])
    assert not torch.isfinite(logprobs[0])
    assert torch.isfinite(logprobs[1])
    assert 0 <= tokens[0] < V


@pytest.mark.parametrize(
    ("sampling", "stopping", "said"),
    [
        ({"temperature": -1.0}, {}, "temperature"),
        ({"temperature": 1e-9}, {}, "temperature"),
        ({"temperature": float("nan")}, {}, "temperature"),
        ({"top_p": 0.0}, {}, "top_p"),
        ({"min_p": 1.5}, {}, "min_p"),
        ({"repetition_penalty": 0.0}, {}, "repetition_penalty"),
        ({"completions": 0}, {}, "completions"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens"),
        ({}, {"min_new_tokens": 9}, "min_new_tokens"),
        ({}, {"stop_token_ids": (V,)}, "stop_token_ids"),
        ({}, {"stop_strings": ("",)}, "stop_strings"),
    ],
)
def test_numbers_out_of_range_are_named(sampling: dict[str, Any], stopping: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check_sampling(Sampling(**sampling), Stopping(**{"max_new_tokens": 8, **stopping}), V)
