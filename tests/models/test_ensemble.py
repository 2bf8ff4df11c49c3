"""Ensembles: a folder that a single model can be read from, groups and members each normalised, and any damage
named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.errors import ModelError
from rlhf.models.ensemble import (
    ENSEMBLE_FILE,
    Heads,
    RewardEnsemble,
    about,
    combine_groups,
    raw_values,
    reward_sha256,
    save_heads,
)
from rlhf.models.padding import pad
from rlhf.models.reward import FACTS_FILE, RewardModel
from support.tiny import tiny_lm_folder, tiny_reward_folder, tiny_tokenizer

SEQUENCES = [[5, 6, 7, 0], [9, 10, 0], [30, 31, 32, 33, 34, 0], [8, 0]]


def ensemble_folder(folder: Path, members: int = 3, groups: int = 2, combine: str = "least") -> Path:
    model = RewardModel.new(tiny_lm_folder(folder.with_name("start")), seed=1)
    weight = torch.randn(members, groups, 16, generator=torch.Generator().manual_seed(0))
    heads = Heads(weight, torch.zeros(1), torch.ones(1), torch.tensor([0.75, 0.25])[:groups], combine, 0.25)
    with torch.no_grad():
        hidden = model.last_hidden(*pad(SEQUENCES, 1))
    heads = heads.normalised(raw_values([hidden], weight))
    model.facts["ensemble"] = about(heads, "shared")
    model.save(folder, tiny_tokenizer(), (), lambda temporary: save_heads(temporary, heads))
    return folder


def last_scores(model: RewardEnsemble) -> torch.Tensor:
    ids, mask = pad(SEQUENCES, 1)
    with torch.no_grad():
        values = model.token_values(ids, mask)
    return values[torch.arange(len(SEQUENCES)), mask.sum(1) - 1]


@pytest.mark.parametrize("combine", ["mean", "least", "quantile"])
def test_every_member_has_mean_0_and_std_1_on_the_reference_set(tmp_path: Path, combine: str) -> None:
    model = RewardEnsemble.load(ensemble_folder(tmp_path / "e", combine=combine))
    scores = last_scores(model)
    assert scores.shape == (4, 3)
    torch.testing.assert_close(scores.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.std(0), torch.ones(3), rtol=0, atol=1e-5)
    assert model.reference_scores is not None
    torch.testing.assert_close(scores, model.reference_scores, rtol=0, atol=1e-5)


def test_ordinary_folder_is_an_ensemble_of_one(tmp_path: Path) -> None:
    folder = tiny_reward_folder(tmp_path / "one")
    model, single = RewardEnsemble.load(folder), RewardModel.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(last_scores(model)[:, 0], single(*pad(SEQUENCES, 1)))
    assert (model.members, model.reference_scores) == (1, None)


def test_groups_are_combined_as_named() -> None:
    values, shares = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0.5, 0.2, 0.3])
    assert float(combine_groups(values, shares, "mean", 0)) == pytest.approx(2.3)
    assert float(combine_groups(values, shares, "least", 0)) == 1
    assert [float(combine_groups(values, shares, "quantile", q)) for q in (0.0, 0.2, 0.21, 0.5, 0.51, 1.0)] == [
        *(1.0, 1.0, 2.0, 2.0, 3.0, 3.0)
    ]


def test_heads_that_score_all_alike_are_refused() -> None:
    heads = Heads(torch.zeros(2, 1, 4), torch.zeros(1), torch.ones(1), torch.ones(1))
    with pytest.raises(ModelError, match="whole reference set alike"):
        heads.normalised(torch.ones(5, 2, 1) + 1e-5 * torch.randn(5, 2, 1))


def test_hash_covers_the_heads(tmp_path: Path) -> None:
    one, other = ensemble_folder(tmp_path / "a"), ensemble_folder(tmp_path / "b", groups=1)
    assert reward_sha256(one) != reward_sha256(other)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = ensemble_folder(tmp_path / "e")
    facts = json.loads((folder / FACTS_FILE).read_text())
    facts["ensemble"]["members"] = 5
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="another number than"):
        RewardEnsemble.load(folder)
    (folder / ENSEMBLE_FILE).write_bytes(b"half")
    with pytest.raises(ModelError, match="is missing or damaged"):
        RewardEnsemble.load(folder)
    (folder / ENSEMBLE_FILE).unlink()
    with pytest.raises(ModelError, match="is missing or damaged"):
        RewardEnsemble.load(folder)
