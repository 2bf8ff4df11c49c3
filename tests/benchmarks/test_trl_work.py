"""The work that TRL and this project are compared on: its size, and the count of its operations."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.trl_work import Folders, Work, make, operations
from rlhf.models.causal import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer

SMALL = Work(vocab_size=512, hidden_size=32, layers=2, heads=2, batch=3, prompts=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = Folders(tmp_path_factory.mktemp("work"))
    make(SMALL, made)
    return made


def test_operations_are_those_of_the_matrix_products(folders):
    """Counted by torch on a forward pass, with the vocabulary at every place and attention over the whole square."""
    model = load_causal_lm(folders.policy)
    model.set_attn_implementation("eager")
    tokens = SMALL.prompt_tokens + SMALL.response_tokens
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(SMALL.batch, tokens, dtype=torch.int64), use_cache=False)
    found = operations(SMALL, model.config.intermediate_size)
    half_attention = SMALL.batch * SMALL.layers * 2 * SMALL.hidden_size * tokens**2
    prompt_head = SMALL.batch * 2 * SMALL.vocab_size * SMALL.hidden_size * SMALL.prompt_tokens
    # Rotary angles are a product too: half a head's width times the positions.
    angles = 2 * tokens * SMALL.hidden_size // SMALL.heads // 2
    counted = counter.get_total_flops()
    assert counted - half_attention - prompt_head == pytest.approx(found.generate, abs=2 * SMALL.batch * angles)
    assert found.total == found.generate + found.score + found.train
    # Scoring is a pass of two models of which one has the vocabulary, as training is of policy and critic.
    assert found.train == pytest.approx((1 + 3 * SMALL.epochs) * found.score)


def test_prompts_have_their_length_and_nothing_ends(folders):
    tokenizer = load_tokenizer(folders.policy)
    texts = [json.loads(line)["prompt"] for line in folders.prompts.read_text().splitlines()]
    assert len(set(texts)) == SMALL.prompts
    assert {len(tokenizer(text).input_ids) for text in texts} == {SMALL.prompt_tokens}
    assert tokenizer.eos_token_id is None
    assert load_causal_lm(folders.policy).generation_config.eos_token_id is None


def test_the_full_size_is_a_model_of_four_million_parameters():
    work = Work()
    assert (work.vocab_size, work.hidden_size, work.layers, work.batch) == (4096, 256, 4, 64)
    assert operations(work, 672).total == pytest.approx(852e9, rel=0.01)
