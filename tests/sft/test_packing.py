from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rlhf.sft.bigram import bigram_perplexity
from rlhf.sft.packing import PackedRows, stream_in_order, token_stream
from rlhf.sft.settings import PretrainSettings
from rlhf.sft.tokens import encode_texts, mean_nll, nll_sum
from support.tiny import TEXTS, tiny_lm, tiny_tokenizer


def test_an_end_token_stands_before_and_behind_every_document() -> None:
    documents = [np.array([5, 6], np.int32), np.array([7], np.int32)]
    assert token_stream(documents, 0).tolist() == [0, 5, 6, 0, 7, 0]


def test_every_token_is_predicted_once_from_the_one_before() -> None:
    stream = np.arange(100, 124, dtype=np.int32)
    for batches in ([PackedRows(stream, 5, 2, seed=0).micro_batch(n) for n in (0, 1)], stream_in_order(stream, 5, 2)):
        batch_list = list(batches)
        inputs = torch.cat([batch.input_ids.flatten() for batch in batch_list])
        labels = torch.cat([batch.labels.flatten() for batch in batch_list])
        counted = labels != -100
        assert torch.equal(labels[counted], inputs[counted] + 1)
        assert len(set(labels[counted].tolist())) == int(counted.sum())
    assert sorted(labels[counted].tolist()) == list(range(101, 124))


def test_rows_come_once_an_epoch_in_an_order_of_the_seed() -> None:
    stream = np.arange(8 * 4 + 1, dtype=np.int32)
    rows = PackedRows(stream, 4, 3, seed=1)
    first = torch.cat([rows.micro_batch(n).input_ids[:, 0] for n in range(8)])
    for epoch in range(3):
        assert sorted(first[epoch * 8 : epoch * 8 + 8].tolist()) == list(range(0, 32, 4))
    assert first[:8].tolist() != first[8:16].tolist()
    assert first[:3].tolist() == PackedRows(stream, 4, 3, seed=1).micro_batch(0).input_ids[:, 0].tolist()
    assert first[:8].tolist() != torch.cat([PackedRows(stream, 4, 8, 2).micro_batch(0).input_ids[:, 0]]).tolist()


def test_too_little_for_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="4 tokens do not fill one row of 4"):
        PackedRows(np.arange(4, dtype=np.int32), 4, 1, 0)


def test_nll_is_the_plain_sum_over_labels() -> None:
    model = tiny_lm()
    batch = next(stream_in_order(np.arange(3, 25, dtype=np.int32), 8, 2))
    log_p = torch.log_softmax(model(batch.input_ids).logits.double(), -1)
    expected = -sum(log_p[b, t, batch.labels[b, t]] for b in range(2) for t in range(8))
    torch.testing.assert_close(nll_sum(model, batch).double(), expected, rtol=1e-6, atol=0)
    assert batch.weight == 16


def test_mean_nll_weighs_tokens_not_batches() -> None:
    model = tiny_lm().train()
    stream = np.arange(3, 23, dtype=np.int32)
    batches = list(stream_in_order(stream, 8, 2))
    assert [batch.weight for batch in batches] == [16.0, 3.0]
    expected = sum(float(nll_sum(model, batch).detach()) for batch in batches) / 19
    assert mean_nll(model, batches, PretrainSettings()) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_texts_are_encoded_as_one_by_one() -> None:
    encoded = encode_texts(tiny_tokenizer(), TEXTS)
    assert [each.tolist() for each in encoded] == [tiny_tokenizer()(text).input_ids for text in TEXTS]


def naive_bigram(train: list[int], heldout: list[int], vocab: int, weight: float) -> float:
    total = 0.0
    for before, after in itertools.pairwise(heldout):
        single = (train.count(after) + 1) / (len(train) + vocab)
        followers = [b for a, b in itertools.pairwise(train) if a == before]
        p = weight * followers.count(after) / len(followers) + (1 - weight) * single if followers else single
        total -= math.log(p)
    return math.exp(total / (len(heldout) - 1))


def test_bigram_is_the_naive_one_at_the_best_weight() -> None:
    generator = np.random.default_rng(0)
    train = generator.integers(0, 7, 300)
    train[1::2] = (train[::2] + 1) % 7
    heldout = np.concatenate([train[40:60], [9, 3]])
    cut = 270
    tail_perplexity = lambda w: naive_bigram(train[:cut].tolist(), train[cut - 1 :].tolist(), 10, w)  # noqa: E731
    weight = min(np.linspace(0.05, 0.95, 19), key=tail_perplexity)
    expected = naive_bigram(train.tolist(), heldout.tolist(), 10, weight)
    assert 0.1 < weight < 0.9
    assert bigram_perplexity(train.astype(np.int32), heldout.astype(np.int32), 10) == pytest.approx(expected, rel=1e-9)
