from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.errors import ModelError
from rlhf.models.folders import sha256_file
from rlhf.models.reward import RewardModel
from rlhf.models.weights import copy_weights, load_weights, named_weights, read_manifest, write_weights
from rlhf.wire.records import WeightVersion
from support.tiny import tiny_lm, tiny_reward_folder

IDS = torch.tensor([[5, 6, 7]])


def written(folder: Path, seed: int = 0, parent: WeightVersion | None = None) -> WeightVersion:
    return write_weights(folder, tiny_lm(seed=seed), run_id="r", epoch=1, step=7, tokenizer_sha256="t", parent=parent)


def test_weights_travel(tmp_path: Path) -> None:
    version = written(tmp_path / "1-7", seed=4)
    receiver, sender = tiny_lm(seed=0), tiny_lm(seed=4)
    assert not torch.equal(receiver(IDS).logits, sender(IDS).logits)
    copy_weights(receiver, load_weights(tmp_path / "1-7", version))
    assert torch.equal(receiver(IDS).logits, sender(IDS).logits)
    assert receiver.lm_head.weight is receiver.model.embed_tokens.weight


def test_version_and_manifest_say_what_was_written(tmp_path: Path) -> None:
    first = written(tmp_path / "a")
    second = written(tmp_path / "b", seed=1, parent=first)
    file = tmp_path / "b" / "model.safetensors"
    manifest = read_manifest(tmp_path / "b")
    assert second == WeightVersion("r", 1, 7, sha256_file(file))
    assert (manifest.version, manifest.parent, manifest.tokenizer_sha256) == (second, first, "t")
    assert manifest.size_bytes == file.stat().st_size
    assert manifest.tensors["model.embed_tokens.weight"] == ("float32", (280, 16))


def test_tied_weights_go_once() -> None:
    names = named_weights(tiny_lm())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_reward_model_has_weights_too(tmp_path: Path) -> None:
    model = RewardModel.load(tiny_reward_folder(tmp_path / "rm"))
    other = RewardModel.load(tiny_reward_folder(tmp_path / "rm2", seed=8))
    copy_weights(model, named_weights(other))
    mask = torch.ones_like(IDS, dtype=torch.bool)
    assert torch.equal(model(IDS, mask), other(IDS, mask))


def test_flipped_byte_is_found(tmp_path: Path) -> None:
    version = written(tmp_path / "w")
    file = tmp_path / "w" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match=f"{file} was altered"):
        load_weights(tmp_path / "w", version)


def test_cut_and_missing_files_are_found(tmp_path: Path) -> None:
    version = written(tmp_path / "w")
    file = tmp_path / "w" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="it was cut short or replaced"):
        load_weights(tmp_path / "w", version)
    file.unlink()
    with pytest.raises(ModelError, match="is missing"):
        load_weights(tmp_path / "w", version)


def test_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "w")
    with pytest.raises(ModelError, match=r"w: holds weights r/1-7/.*, not r/1-8/ab"):
        load_weights(tmp_path / "w", WeightVersion("r", 1, 8, "ab"))


@pytest.mark.parametrize("change", [{"version": None}, {"version": {}}, {"tensors": {"a": 1}}, {"size_bytes": "x"}])
def test_manifest_that_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    written(tmp_path / "w")
    path = tmp_path / "w" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match="is no manifest of weights"):
        read_manifest(tmp_path / "w")


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = tiny_lm()
    before = model(IDS).logits
    wrong_names = {name: torch.zeros_like(tensor) for name, tensor in named_weights(model).items()}
    del wrong_names["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model\.norm\.weight on one side only"):
        copy_weights(model, wrong_names)
    wrong_shape = {name: torch.zeros_like(tensor) for name, tensor in named_weights(model).items()}
    wrong_shape["model.norm.weight"] = torch.zeros(17)
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(17,\), \(16,\) expected"):
        copy_weights(model, wrong_shape)
    assert torch.equal(model(IDS).logits, before)
