"""An adapter computes, saves and merges as peft itself would, and its base never changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import ModelError, SettingsError
from rlhf.models.adapters import add_adapter, merge_into, merged
from rlhf.models.base import Base
from rlhf.models.causal import load_causal_lm, save_model, weights_sha256
from rlhf.models.weights import (
    AdapterOf,
    adapter_of,
    copy_weights,
    load_weights,
    named_weights,
    published_sha256,
    read_manifest,
    write_weights,
)
from rlhf.ppo.settings import LoraSettings
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 100, 33]])
BASE = "ab" * 32
EVERYWHERE = LoraSettings(rank=4, alpha=8, target_modules="all-linear")


def adapted(
    architecture: str = "llama", settings: LoraSettings = EVERYWHERE, *, trained: bool = True
) -> PreTrainedModel:
    model = tiny_lm(architecture)
    add_adapter(model, settings, BASE, seed=3)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in named_weights(model).values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_at_first_it_changes_nothing(architecture: str) -> None:
    assert torch.equal(logits(adapted(architecture, trained=False)), logits(tiny_lm(architecture)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [EVERYWHERE, LoraSettings(rank=2, rslora=True)])
def test_merged_computes_what_the_adapter_computes(architecture: str, settings: LoraSettings) -> None:
    model = adapted(architecture, settings)
    plain = merged(model)
    assert not torch.allclose(logits(plain), logits(tiny_lm(architecture)), atol=0.05), "the adapter does something"
    torch.testing.assert_close(logits(plain), logits(model), atol=2e-5, rtol=1e-5)
    assert adapter_of(plain) is None
    assert named_weights(plain).keys() == named_weights(tiny_lm(architecture)).keys()
    assert adapter_of(model) is not None, "which stays as it was"


# peft asks transformers by a name that is to go.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_folder_is_an_ordinary_one_and_peft_reads_the_adapter(tmp_path: Path, architecture: str) -> None:
    model = adapted(architecture)
    save_model(model, tiny_tokenizer(), tmp_path / "policy")
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "policy")), logits(model), atol=2e-5, rtol=1e-5)
    by_peft = PeftModel.from_pretrained(tiny_lm(architecture), str(tmp_path / "policy" / "adapter"))
    torch.testing.assert_close(logits(by_peft), logits(model), atol=1e-6, rtol=0)


def test_what_is_published_is_the_adapter_alone(tmp_path: Path) -> None:
    model = adapted()
    version = write_weights(tmp_path / "0-1", model, run_id="r", epoch=0, step=1, tokenizer_sha256="t")
    manifest = read_manifest(tmp_path / "0-1")
    assert manifest.adapter == AdapterOf(BASE, 2.0)
    tensors = load_weights(tmp_path / "0-1", version)
    # Two layers with seven linear ones each, an A and a B.
    assert len(tensors) == len(manifest.tensors) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert version.sha256 == published_sha256(model)
    receiver = tiny_lm()
    merge_into(receiver, tiny_lm(), tensors, manifest.adapter.scaling)
    assert torch.equal(logits(receiver), logits(merged(model)))
    other = adapted(trained=False)
    copy_weights(other, tensors)
    assert torch.equal(logits(other), logits(model))


def test_only_the_adapter_learns_and_its_start_is_decided_by_the_seed() -> None:
    model = adapted(trained=False)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == named_weights(model).keys()
    assert published_sha256(model) == published_sha256(adapted(trained=False))
    other = tiny_lm()
    add_adapter(other, EVERYWHERE, BASE, seed=4)
    assert published_sha256(model) != published_sha256(other)


def test_tied_embeddings_stay_tied_and_in_place() -> None:
    model = adapted()
    plain = merged(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("targets", [("nowhere",), ("embed_tokens",), ("q_proj", "lm_head")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_targets_that_cannot_be(targets: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"lora\.target_modules"):
        add_adapter(tiny_lm(), LoraSettings(rank=2, target_modules=targets), BASE, seed=0)


def test_an_adapter_of_another_shape_is_refused() -> None:
    tensors, receiver = named_weights(adapted()), tiny_lm(seed=1)
    with pytest.raises(ModelError, match="does not fit"):
        merge_into(receiver, tiny_lm("gpt2"), tensors, 1.0)
    del tensors[next(iter(tensors))]
    with pytest.raises(ModelError, match="its A and its B"):
        merge_into(receiver, tiny_lm(), tensors, 1.0)
    with pytest.raises(ModelError, match="its A and its B"):
        merge_into(receiver, tiny_lm(), named_weights(tiny_lm()), 1.0)
    assert torch.equal(logits(receiver), logits(tiny_lm(seed=1))), "nothing was changed"


def test_a_base_refuses_the_adapters_of_others(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "base")
    base = Base(folder, weights_sha256(folder))
    tensors = named_weights(adapted())
    with pytest.raises(ModelError, match=rf"for the model with sha256 {BASE[:12]}.*has {base.sha256[:12]}.*ppo\.model"):
        base.merge_into(tiny_lm(), tensors, AdapterOf(BASE, 2.0))
    model = tiny_lm(seed=1)
    base.merge_into(model, tensors, AdapterOf(base.sha256, 2.0))
    assert torch.equal(logits(model), logits(merged(adapted())))


def test_a_base_that_was_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "base")
    base = Base(folder, weights_sha256(folder))
    tiny_lm_folder(folder, seed=5)
    with pytest.raises(ModelError, match="was changed since"):
        base.merge_into(tiny_lm(), named_weights(adapted()), AdapterOf(base.sha256, 2.0))
