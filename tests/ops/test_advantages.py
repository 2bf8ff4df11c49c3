"""GAE as a scan against the loop that defines it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rlhf.ops import gae
from rlhf.ops.advantages import gae_definition
from support.ops_cases import DEVICE


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_any_mask(seed, tokens, share, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, tokens, generator=generator)
    mask = torch.rand(3, tokens, generator=generator) < share
    rewards[~mask] = torch.nan
    truth = gae_definition(rewards.double().nan_to_num(), values.double(), mask, gamma, lam)
    found = gae(rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE), gamma, lam)
    torch.testing.assert_close(found.cpu().double(), truth, atol=1e-4, rtol=1e-5)


def test_blocks_of_time_follow_each_other():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 2, 2500, generator=generator)
    mask = torch.rand(2, 2500, generator=generator) < 0.7
    # Nothing counts at the seam of two blocks.
    mask[0, 1000:1050] = False
    truth = gae_definition(rewards.double(), values.double(), mask, 0.999, 0.97)
    found = gae(rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE), 0.999, 0.97)
    torch.testing.assert_close(found.cpu().double(), truth, atol=1e-4, rtol=1e-5)


def test_a_wrong_argument_is_named():
    x, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one shape \[B, T\] expected"):
        gae(x, torch.zeros(2, 4), mask, 1.0, 1.0)
    with pytest.raises(ValueError, match="response_mask: bool expected"):
        gae(x, x, mask.long(), 1.0, 1.0)


def test_no_tokens():
    empty = torch.zeros(0, 4, device=DEVICE)
    assert gae(empty, empty, empty.bool(), 1.0, 1.0).shape == (0, 4)
