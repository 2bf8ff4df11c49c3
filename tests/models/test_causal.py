from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from rlhf.errors import ModelError, SettingsError
from rlhf.models import compute, pretrained, tokenizer
from rlhf.models.causal import disable_dropout, load_causal_lm, new_causal_lm, save_model, weights_sha256
from rlhf.models.folders import sha256_file
from rlhf.sft.settings import PretrainSettings
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_folder_is_an_ordinary_one(tmp_path: Path, architecture: str) -> None:
    folder = tiny_lm_folder(tmp_path / "m", architecture)
    ours, plain = load_causal_lm(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert not ours.training
    torch.testing.assert_close(ours(IDS).logits, tiny_lm(architecture)(IDS).logits, rtol=0, atol=0)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=0, atol=0)


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    model = load_causal_lm(tiny_lm_folder(tmp_path / "m"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_same_seed_same_model_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (new_causal_lm(PretrainSettings(seed=s), tiny_tokenizer()) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_embeddings_are_tied_and_the_default_has_about_a_million_parameters() -> None:
    model = new_causal_lm(PretrainSettings(), tiny_tokenizer())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    without_embedding = model.num_parameters() - model.lm_head.weight.numel()
    assert 0.9e6 < without_embedding + 1024 * 128 < 1.1e6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 30}, "pretrain.hidden_size: 30 cannot be divided among 4 heads"),
        ({"hidden_size": 12}, "even width"),
        ({"sequence_length": 300}, "pretrain.sequence_length: 300 is longer than pretrain.context, 256"),
    ],
)
def test_shapes_that_cannot_be(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        new_causal_lm(PretrainSettings(**changes), tiny_tokenizer())


def test_missing_folder_config_weights_and_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent: no such model folder"):
        load_causal_lm(tmp_path / "absent")
    for name, sentence in (
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no model.safetensors; only safetensors are read"),
        ("tokenizer.json", "has no tokenizer"),
    ):
        folder = tiny_lm_folder(tmp_path / "m")
        (folder / name).unlink()
        with pytest.raises(ModelError, match=f"{folder}: {sentence}"):
            load_causal_lm(folder)


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.9, 0.9999])
def test_truncated_weights(tmp_path: Path, kept_share: float) -> None:
    folder = tiny_lm_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * kept_share)])
    with pytest.raises(ModelError, match=f"{folder}: the model cannot be loaded; a file may be cut short"):
        load_causal_lm(folder)


def test_truncated_config(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelError, match=f"{folder / 'config.json'} cannot be read as JSON"):
        load_causal_lm(folder)


def test_unknown_model_type(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(ModelError, match=f"{folder}: the model cannot be loaded.*no-such-thing"):
        load_causal_lm(folder)


def test_encoder_is_refused_by_its_config(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path}: holds a BertForMaskedLM, but a causal language model"):
        load_causal_lm(tmp_path)


def test_weights_of_another_model_are_refused_though_the_config_is_right(tmp_path: Path) -> None:
    folder, other = tiny_lm_folder(tmp_path / "m"), tiny_lm_folder(tmp_path / "g", "gpt2")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=f"{folder}: weights are missing"):
        load_causal_lm(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=f"{folder}: the model cannot be loaded"):
        load_causal_lm(folder)


def test_vocabulary_smaller_than_the_tokenizers(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    save_model(LlamaForCausalLM(config), tiny_tokenizer(), tmp_path / "m")
    with pytest.raises(ModelError, match=r"m: the tokenizer has 280 entries but the model embeds only 100"):
        load_causal_lm(tmp_path / "m")


def test_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="device: 'abacus' cannot be used on this machine"):
        load_causal_lm(tiny_lm_folder(tmp_path / "m"), device="abacus")


def test_full_disk_while_saving_keeps_the_old_folder(tmp_path: Path) -> None:
    """A file-size limit acts inside safetensors' own writing, as a full disk does."""
    folder = tiny_lm_folder(tmp_path / "m")
    before = sha256_file(folder / "model.safetensors")
    script = (
        "import sys; from pathlib import Path; from support.tiny import tiny_lm_folder\n"
        "from rlhf.errors import StorageError\n"
        "try: tiny_lm_folder(Path(sys.argv[1]), seed=9)\n"
        "except StorageError as error: print(error)"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        preexec_fn=limit,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert f"{folder} could not be written: File too large" in ran.stdout
    assert sha256_file(folder / "model.safetensors") == before
    load_causal_lm(folder)


def test_hash_of_one_file_is_its_sha256_and_of_shards_another_for_another_order(tmp_path: Path) -> None:
    folder = tiny_lm_folder(tmp_path / "m")
    assert weights_sha256(folder) == sha256_file(folder / "model.safetensors")
    hashes = set()
    for shards in ((b"a", b"b"), (b"b", b"a")):
        for number, data in enumerate(shards, 1):
            (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(data)
        hashes.add(weights_sha256(tmp_path))
    assert len(hashes) == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dropout_off_makes_training_mode_deterministic(architecture: str) -> None:
    model = tiny_lm(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    disable_dropout(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_an_error_that_says_nothing_still_makes_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise RuntimeError

    folder = tiny_lm_folder(tmp_path / "m")
    monkeypatch.setattr(compute.torch, "empty", silent)
    with pytest.raises(SettingsError, match=r"device: 'cpu' cannot be used on this machine \(RuntimeError\)"):
        compute.torch_device("cpu")
    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", silent)
    with pytest.raises(ModelError, match=f"{folder}: its tokenizer cannot be read: RuntimeError"):
        tokenizer.load_tokenizer(folder)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(LlamaConfig): model_type = "own"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


OWN_CODE: list[tuple[str, dict[str, object]]] = [
    ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}),
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "own.Model"}}),
    ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}),
]


@pytest.mark.parametrize(("file", "changes"), OWN_CODE)
def test_code_in_a_folder_is_refused_and_neither_run_nor_asked_about(
    tmp_path: Path, file: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = tiny_lm_folder(tmp_path / "m"), tmp_path / "ran"
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(ModelError, match=rf"{folder}: {file} names code of the folder's own \(auto_map\)"):
        load_causal_lm(folder)
    assert not marker.exists()
    assert not asked


def test_transformers_is_told_to_trust_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the look at a folder's files has missed that it brings code."""
    folder, marker = tiny_lm_folder(tmp_path / "m"), tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for module in (pretrained, tokenizer):
        monkeypatch.setattr(module, "refuse_code", lambda folder: None)
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    for file, changes in OWN_CODE:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))
        for load in (load_causal_lm, tokenizer.load_tokenizer):
            with contextlib.suppress(ModelError):
                load(folder)
    assert not marker.exists()
