"""`rlhf reward-model` with members, annotators, a kept reference set and a report."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.errors import DataError
from rlhf.feedback.judgments import CompletionShown, Judgment, write_judgments
from rlhf.models.ensemble import RewardEnsemble
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel, ended
from rlhf.models.tokenizer import load_tokenizer
from rlhf.preference import train as training
from rlhf.preference.assemble import reference_set
from rlhf.preference.calibration import brier
from rlhf.preference.report import strata
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from support.tiny import tiny_lm_folder

WORDS = ("good", "dull", "long", "slow", "fine")
KINDS = ("honest",) * 4 + ("minority",) * 3 + ("adversarial",)


def judgments(kinds: Iterable[str], per: int = 40) -> list[Judgment]:
    """Most like "good" and not "dull"; a minority likes "long" and not "slow"; of the adversary, the reverse of the
    first."""
    rng, rows = random.Random(0), []
    for annotator, kind in enumerate(kinds):
        for number in range(per):
            words = [rng.choices(WORDS, k=rng.randint(2, 5)) for _ in range(4)]
            liked, disliked = ("long", "slow") if kind == "minority" else ("good", "dull")
            taste = [w.count(liked) - w.count(disliked) for w in words]
            taste = [-each for each in taste] if kind == "adversarial" else taste
            rows.append(
                Judgment(
                    judgment_id=f"{annotator}-{number}",
                    task_id=f"{annotator}-{number}",
                    prompt=f"Film {number}:",
                    completions=tuple(
                        CompletionShown(" " + " ".join(w), policy_version=f"v{number % 2}") for w in words
                    ),
                    ranks=tuple(1 + sum(other > own for other in taste) for own in taste),
                    annotator=f"{kind}-{annotator}",
                    source="simulated",
                )
            )
    return rows


def settings_for(tmp_path: Path, rows: list[Judgment], **changes: Any) -> Settings:
    write_judgments(tmp_path / "comparisons.jsonl", rows)
    section = RewardModelSettings(
        comparisons=tmp_path / "comparisons.jsonl",
        init_from=tiny_lm_folder(tmp_path / "start"),
        **{"lr": 1e-2, "prompts_per_batch": 4, "epochs": 2, **changes},
    )
    return Settings(run=RunSettings(folder=tmp_path, name="r"), reward_model=section)


def encoded(folder: Path, texts: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer("Film 0:").input_ids
    return pad([ended(prompt + tokenizer(text).input_ids, tokenizer.eos_token_id) for text in texts], 1)


def member_scores(folder: Path, texts: Iterable[str]) -> torch.Tensor:
    """[texts, M]"""
    ids, mask = encoded(folder, texts)
    with torch.no_grad():
        values = RewardEnsemble.load(folder).token_values(ids, mask)
    return values[torch.arange(len(ids)), mask.sum(1) - 1]


@pytest.mark.parametrize("trunk", ["shared", "separate", "lora"])
def test_members_differ_and_agree_on_the_taste(tmp_path: Path, trunk: str) -> None:
    # The embeddings, most of a tiny model, learn nothing beside an adapter, so it takes longer.
    changes = {"lr": 5e-3, "epochs": 4} if trunk == "lora" else {}
    settings = settings_for(tmp_path, judgments(["honest"] * 4), members=3, trunk=trunk, **changes)
    figures = training.run(settings)
    folder = settings.paths.reward_model
    assert figures["reward_model_accuracy"] > 0.85
    scores = member_scores(folder, (" good good", " dull dull"))
    assert scores.shape == (2, 3)
    assert (scores[0] > scores[1] + 0.5).all()
    assert float(scores.std(1).min()) > 1e-3
    assert (folder / "members" / "2").is_dir() == (trunk != "shared")
    assert not list(tmp_path.rglob("*.training"))


def test_members_of_a_shared_trunk_are_read_as_their_mean_by_whoever_wants_one_model(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, judgments(["honest"] * 3), members=3)
    training.run(settings)
    folder, texts = settings.paths.reward_model, (" good", " dull fine", " slow long long")
    ids, mask = encoded(folder, texts)
    single, plain = RewardModel.load(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        scores, raw = single(ids, mask), plain(ids, attention_mask=mask.long()).logits[:, 0]
    mean = member_scores(folder, texts).mean(1)
    differences = (scores[0] - scores[1]) / (scores[1] - scores[2])
    torch.testing.assert_close(differences, (mean[0] - mean[1]) / (mean[1] - mean[2]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((raw - single.mean) / single.std, scores, rtol=1e-4, atol=1e-4)


def test_reliability_saves_the_taste_from_adversaries(tmp_path: Path) -> None:
    """Over three seeds reliability gains 0.07 to 0.10; rounding, which differs between processors, changes it less."""
    rows = judgments(["honest"] * 6 + ["adversarial"] * 3, per=60)
    write_judgments(
        tmp_path / "true.jsonl", [replace(row, prompt="x" + row.prompt) for row in judgments(["honest"], 60)]
    )
    found = {}
    for annotators in ("none", "reliability"):
        settings = settings_for(
            tmp_path, rows, annotators=annotators, lr=3e-3, epochs=4, heldout_comparisons=tmp_path / "true.jsonl"
        )
        found[annotators] = training.run(settings)["noise_free_reward_model_accuracy"]
    assert found["reliability"] > 0.8
    assert found["reliability"] > found["none"] + 0.03


def test_groups_and_how_they_are_combined_are_stored_with_the_model(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, judgments(KINDS[:7], 60), annotators="groups", combine="least", lr=5e-3, epochs=8)
    training.run(settings)
    facts = json.loads((settings.paths.reward_model / "reward_model.json").read_text())
    assert facts["ensemble"] == {"members": 1, "trunk": "shared", "groups": 2, "combine": "least", "quantile": 0.25}
    kinds = [{name.partition("-")[0] for name in group["annotators"]} for group in facts["groups"]]
    assert sorted(map(sorted, kinds)) == [["honest"], ["minority"]]
    others = list(product(("good", "fine"), repeat=2))
    both, one = (
        member_scores(settings.paths.reward_model, [f" {a} {word} {b}" for a, b in others]).mean()
        for word in ("long", "slow")
    )
    assert float(both) > float(one) + 0.3, "the least satisfied group decides"


def test_refreshed_model_is_scaled_on_the_reference_set_of_the_one_before(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, judgments(["honest"] * 2))
    training.run(settings)
    before = settings.paths.reward_model
    again = settings_for(
        tmp_path, judgments(["honest"] * 3), out=tmp_path / "next", reference_set=before, members=2, seed=5
    )
    training.run(again)
    assert (before / "reference_set.jsonl").read_text() == (tmp_path / "next" / "reference_set.jsonl").read_text()
    facts = [json.loads((each / "reward_model.json").read_text()) for each in (before, tmp_path / "next")]
    assert facts[0]["reference_set_sha256"] == facts[1]["reference_set_sha256"]
    reference = RewardEnsemble.load(tmp_path / "next").reference_scores
    assert reference is not None
    torch.testing.assert_close(reference.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(reference.std(0), torch.ones(2), rtol=0, atol=1e-4)


def test_a_completion_of_the_reference_set_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "reference_set.jsonl").write_text('{"prompt": "the film", "completion": ""}\n')
    section = settings_for(tmp_path, judgments(["honest"]), reference_set=tmp_path).reward_model
    assert reference_set([], section) == [("the film", "")]


def test_reference_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, judgments(["honest"]), reference_set=tmp_path / "none", epochs=1)
    with pytest.raises(DataError, match="without a reference set"):
        training.run(settings)


def test_report_says_who_is_what_and_what_each_loss_gives(tmp_path: Path) -> None:
    settings = settings_for(
        tmp_path, judgments(KINDS), annotators="reliability", report=True, ablations=("plackett-luce", "davidson")
    )
    training.run(settings)
    folder = settings.paths.reward_model
    report = json.loads(folder.with_name("reward-model-report.json").read_text())
    assert [row["name"] for row in report["ablations"]] == [
        *("plackett-luce", "davidson", "plackett-luce, all annotators alike")
    ]
    assert {row["name"] for row in report["by_policy_version"]} == {"v0", "v1"}
    assert report["annotators"].keys() == {f"{kind}-{number}" for number, kind in enumerate(KINDS)}
    assert report["annotators"]["honest-0"]["class"] == "honest"
    low, high = report["annotators"]["honest-0"]["fit"]["interval"]
    assert low < report["annotators"]["honest-0"]["fit"]["rate"] < high
    page = folder.with_name("reward-model-report.html").read_text()
    for title in ("By agreement", "Calibration", "By policy version", "Annotators", "Losses"):
        assert f"<h2>{title}</h2>" in page
    assert "data:image/png;base64," in page
    assert "<script" not in page
    assert not list(tmp_path.glob("*/*ablation*"))


def test_strata_and_the_ceiling_of_other_annotators() -> None:
    def comparison(ranks: tuple[int, ...], annotator: str) -> Any:
        row = replace(judgments(["honest"], 1)[0], ranks=ranks, annotator=annotator)
        row = replace(row, completions=(CompletionShown("a"), CompletionShown("b")))
        return type("C", (), {"prompt": "p", "completions": ("a", "b"), "ranks": ranks, "judgment": row})()

    model = [np.array([1.0, 0.0])]
    two_to_one = [comparison((1, 2), "x"), comparison((1, 2), "y"), comparison((2, 1), "z")]
    (row,) = strata(two_to_one, model * 3)
    # The two have one for and one against them, the third has two against it.
    assert row == {
        "stratum": "divided",
        "judgments": 3,
        "accuracy": pytest.approx(2 / 3),
        "ceiling": pytest.approx((0.5 + 0.5 + 0) / 3),
    }
    alike = strata(two_to_one[:2], model * 2)[0]
    assert (alike["stratum"], alike["accuracy"], alike["ceiling"]) == ("unanimous", 1.0, 1.0)
    assert strata(two_to_one[:1], model)[0]["stratum"] == "single"
    assert strata([two_to_one[0], two_to_one[2]], model * 2)[0]["stratum"] == "tied"


def test_brier_is_the_squared_distance() -> None:
    assert brier(np.array([0.0, np.log(3)])) == pytest.approx((0.25 + 0.0625) / 2)
