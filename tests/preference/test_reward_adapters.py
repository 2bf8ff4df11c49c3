"""`rlhf reward-model` with `trunk = "lora"`: each member an adapter on one base."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rlhf.errors import SettingsError
from rlhf.feedback.judgments import CompletionShown, Judgment, write_judgments
from rlhf.models.adapters import ADAPTER_FILE, CONFIG_FILE, Factors
from rlhf.models.ensemble import ENSEMBLE_FILE, RewardEnsemble, reward_sha256
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel
from rlhf.models.weights import named_weights
from rlhf.preference import comparisons
from rlhf.preference import train as training
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from support.tiny import tiny_lm_folder

WORDS = ("good", "dull", "long", "slow", "fine")
RANK = 3
BATCH = pad([[5, 6, 7, 0], [9, 10, 0], [30, 31, 32, 33, 34, 0], [8, 0]], 1)


def judgments(count: int = 40) -> list[Judgment]:
    """The more "good" and the less "dull", the better."""
    rng, rows = random.Random(0), []
    for number in range(count):
        words = [rng.choices(WORDS, k=rng.randint(2, 5)) for _ in range(4)]
        taste = [w.count("good") - w.count("dull") for w in words]
        rows.append(
            Judgment(
                judgment_id=str(number),
                task_id=str(number),
                prompt=f"Film {number}:",
                completions=tuple(CompletionShown(" " + " ".join(w)) for w in words),
                ranks=tuple(1 + sum(other > own for other in taste) for own in taste),
                annotator=f"a{number % 3}",
                source="simulated",
            )
        )
    return rows


def settings_for(folder: Path, architecture: str = "llama", **changes: Any) -> Settings:
    write_judgments(folder / "comparisons.jsonl", judgments())
    section = RewardModelSettings(
        comparisons=folder / "comparisons.jsonl",
        init_from=tiny_lm_folder(folder / "start", architecture),
        trunk="lora",
        lora_rank=RANK,
        lora_alpha=2 * RANK,
        **{"lr": 1e-2, "prompts_per_batch": 4, "members": 3, **changes},
    )
    return Settings(run=RunSettings(folder=folder, name="r"), reward_model=section)


def stored(folder: Path, member: int) -> Factors:
    """B and A of a member's file."""
    file = folder / "members" / str(member) / ADAPTER_FILE
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(file).items()}
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {layer: (tensors[f"{layer}.lora_B.weight"], tensors[f"{layer}.lora_A.weight"]) for layer in layers}


@torch.no_grad()
def add_product(model: RewardModel, name: str, left: Tensor, right: Tensor) -> None:
    """2·B·A, which is what an adapter counts here, on a layer's weights."""
    layer = model.trunk.get_submodule(name)
    pair = (right.T, left.T) if isinstance(layer, Conv1D) else (left, right)
    layer.weight.addmm_(*pair, alpha=2.0)  # type: ignore[operator, union-attr]


@torch.no_grad()
def hidden(trunk: Any) -> Tensor:
    """[tokens, H], of the tokens that count."""
    found: Tensor = trunk.hidden(*BATCH)
    return found[BATCH[1]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_each_member_is_an_adapter_of_its_own_on_the_model_it_started_from(tmp_path: Path, architecture: str) -> None:
    settings = settings_for(tmp_path, architecture)
    training.run(settings)
    folder = settings.paths.reward_model
    ensemble = RewardEnsemble.load(folder)
    served = [hidden(trunk) for trunk in ensemble.trunks]
    for member in range(3):
        expected = RewardModel.new(tmp_path / "start")
        for name, (left, right) in stored(folder, max(member, 1)).items():
            # The second half takes the first member's adapter off again.
            half = slice(0, RANK) if member else slice(RANK, None)
            add_product(expected, name, left[:, half] if member else -left[:, half], right[half])
        assert float((served[member] - hidden(RewardModel.new(tmp_path / "start"))).abs().amax()) > 1e-2
        torch.testing.assert_close(served[member], hidden(expected), atol=1e-5, rtol=1e-5)
        if member == 0:
            # To the last bit: what has no adapter is as it was, and the rest is one sum away from it.
            first, weights = named_weights(RewardModel.load(folder).trunk), named_weights(expected.trunk)
            assert all(torch.equal(first[name], weights[name]) for name in weights)
    halves = [{name: left[:, :RANK] for name, (left, _) in stored(folder, member).items()} for member in (1, 2)]
    assert all(not torch.equal(halves[0][name], halves[1][name]) for name in halves[0])
    facts = json.loads((folder / "reward_model.json").read_text())
    assert (facts["ensemble"]["trunk"], facts["ensemble"]["members"]) == ("lora", 3)
    config = json.loads((folder / "members" / "1" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (2 * RANK, 4 * RANK)


def test_interrupted_training_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, settings = (settings_for(tmp_path / name, checkpoint_every=2) for name in "ab")
    training.run(whole)
    calls: list[int] = []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            raise RuntimeError("killed")
        return rankings_of(*arguments)

    rankings_of = comparisons.rankings_of
    with monkeypatch.context() as patch:
        patch.setattr(comparisons, "rankings_of", killed)
        with pytest.raises(RuntimeError, match="killed"):
            training.run(settings)
    (newest,) = (settings.paths.reward_model.with_name("reward-model-1.training")).iterdir()
    tensors = load_file(newest / "tensors.safetensors")
    learnt = {name for name in tensors if name.startswith("model/")}
    assert {name.rpartition(".lora_")[1] for name in learnt - {"model/heads"}} == {".lora_"}
    assert len(learnt) == 2 * 14 + 1, "an A and a B in each of seven layers of two blocks, and the head"
    training.run(settings)
    assert reward_sha256(settings.paths.reward_model) == reward_sha256(whole.paths.reward_model)
    assert not list(tmp_path.rglob("*.training"))


def test_one_member_is_an_ordinary_reward_model(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, members=1)
    training.run(settings)
    folder = settings.paths.reward_model
    assert not (folder / ENSEMBLE_FILE).exists()
    assert not (folder / "members").exists()
    assert "ensemble" not in json.loads((folder / "reward_model.json").read_text())
    found, start = (
        named_weights(RewardModel.load(folder).trunk),
        named_weights(RewardModel.new(tmp_path / "start").trunk),
    )
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed == {name for name in start if "_proj." in name}
    ranks = {int(torch.linalg.matrix_rank(found[name] - start[name], atol=1e-5)) for name in changed}
    assert ranks == {RANK}


def test_groups_and_the_report_know_adapters(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, members=2, annotators="groups", report=True, ablations=("plackett-luce",))
    training.run(settings)
    folder = settings.paths.reward_model
    report = json.loads(folder.with_name("reward-model-report.json").read_text())
    assert report["members"] == 2
    assert len(report["ablations"]) == 2
    assert RewardEnsemble.load(folder).token_values(*BATCH).shape[-1] == 2
    assert not list(tmp_path.rglob("*.training"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [("nowhere",), ("embed_tokens",), ("score",)])
def test_layers_that_can_have_no_adapter_are_refused(tmp_path: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"reward_model\.lora_target_modules"):
        training.run(settings_for(tmp_path, lora_target_modules=targets))
