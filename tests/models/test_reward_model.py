from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.errors import ModelError
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel
from support.tiny import tiny_lm_folder, tiny_reward_folder, tiny_tokenizer

SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33], [40]]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> RewardModel:
    return RewardModel.new(tiny_lm_folder(tmp_path / "lm", request.param), seed=3)


def left_padded(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = pad([sequence[::-1] for sequence in sequences], pad_id)
    return ids.flip(1), mask.flip(1)


def test_scores_do_not_depend_on_padding_or_on_the_rest_of_the_batch(model: RewardModel) -> None:
    alone = torch.cat([model(*pad([sequence], 1)) for sequence in SEQUENCES])
    assert alone.std() > 0.01
    for ids, mask in (pad(SEQUENCES, 1), pad(SEQUENCES, 99), left_padded(SEQUENCES, 1)):
        torch.testing.assert_close(model(ids, mask), alone, rtol=0, atol=1e-5)
    longer, mask = pad([*SEQUENCES, list(range(50))], 1)
    torch.testing.assert_close(model(longer, mask)[:4], alone, rtol=0, atol=1e-5)


def test_pad_id_equal_to_a_token_of_the_text_changes_nothing(model: RewardModel) -> None:
    eos = int(tiny_tokenizer().eos_token_id)
    sequences = [[5, eos, 6, 7, eos], [eos, 8], [9, 10, 11, 12, 13, eos, eos]]
    torch.testing.assert_close(model(*pad(sequences, eos)), model(*pad(sequences, 200)), rtol=0, atol=1e-5)
    without_last, mask = pad([sequence[:-1] for sequence in sequences], eos)
    assert (model(without_last, mask) - model(*pad(sequences, eos))).abs().min() > 1e-3


def test_score_is_the_value_of_the_last_token_before_normalisation(model: RewardModel) -> None:
    ids, mask = pad(SEQUENCES, 1)
    values = model.token_values(ids, mask)
    assert values.shape == ids.shape
    last = torch.stack([values[row, len(sequence) - 1] for row, sequence in enumerate(SEQUENCES)])
    torch.testing.assert_close(model.raw_scores(ids, mask), last)
    model.mean, model.std = 2.0, 4.0
    torch.testing.assert_close(model(ids, mask), (last - 2.0) / 4.0)


def test_normalised_reference_set_has_mean_0_and_std_1(model: RewardModel) -> None:
    ids, mask = pad([[n, n + 1] for n in range(2, 100)], 1)
    model.normalise(model.raw_scores(ids, mask).detach())
    scores = model(ids, mask).detach()
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores.std()) == pytest.approx(1, abs=1e-5)


def test_scores_all_alike_cannot_be_normalised(model: RewardModel) -> None:
    with pytest.raises(ModelError, match="scores its whole reference set alike"):
        model.normalise(torch.full((512,), 0.3))


def test_plain_transformers_gives_the_same_raw_scores(tmp_path: Path) -> None:
    folder = tiny_reward_folder(tmp_path / "rm", mean=0.7, std=0.1)
    ours, plain = RewardModel.load(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    ids, mask = pad(SEQUENCES, int(tiny_tokenizer().pad_token_id))
    raw = plain(ids, attention_mask=mask.long()).logits.squeeze(-1)
    torch.testing.assert_close(ours.raw_scores(ids, mask), raw, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(ids, mask), (raw - 0.7) / 0.1, rtol=0, atol=1e-4)


def test_head_has_the_stated_spread_no_bias_and_its_seed(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "lm")
    heads = [RewardModel.new(folder, seed=seed).head for seed in range(200)]
    weights = torch.stack([head.weight.detach() for head in heads])
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(16 + 1), rel=0.05)
    assert heads[0].bias is None
    assert torch.equal(heads[5].weight, RewardModel.new(folder, seed=5).head.weight)


def test_facts_are_saved_and_loaded(tmp_path: Path) -> None:
    model = RewardModel.new(tiny_lm_folder(tmp_path / "lm"))
    model.mean, model.std, model.facts = 0.5, 2.0, {"reference_set_sha256": "ab"}
    model.save(tmp_path / "rm", tiny_tokenizer())
    loaded = RewardModel.load(tmp_path / "rm")
    assert (loaded.mean, loaded.std, loaded.facts) == (0.5, 2.0, {"reference_set_sha256": "ab"})
    assert json.loads((tmp_path / "rm" / "reward_model.json").read_text())["std"] == 2.0


def test_language_model_is_no_reward_model_nor_the_reverse(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds a LlamaForCausalLM, but a sequence classifier"):
        RewardModel.load(tiny_lm_folder(tmp_path / "lm"))
    with pytest.raises(ModelError, match="holds a LlamaForSequenceClassification, but a causal language model"):
        RewardModel.new(tiny_reward_folder(tmp_path / "rm"))


def test_classifier_with_two_labels_is_refused(tmp_path: Path) -> None:
    folder = tiny_reward_folder(tmp_path / "rm")
    two = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    two.save_pretrained(folder)
    with pytest.raises(ModelError, match=f"{folder}: a sequence classifier with one label"):
        RewardModel.load(folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no reward_model.json"),
        ('{"mean": 0}', "numbers `mean` and `std` expected"),
        ('{"mean": 0, "std": 0}', "std > 0 expected"),
        ('{"mean": NaN, "std": 1}', "finite mean"),
        ("[]", "numbers `mean` and `std` expected"),
    ],
)
def test_normalisation_that_cannot_be(tmp_path: Path, content: str | None, sentence: str) -> None:
    folder = tiny_reward_folder(tmp_path / "rm")
    (folder / "reward_model.json").unlink()
    if content is not None:
        (folder / "reward_model.json").write_text(content)
    with pytest.raises(ModelError, match=sentence):
        RewardModel.load(folder)
