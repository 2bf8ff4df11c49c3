from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.rows import write_rows
from rlhf.errors import DataError, SettingsError
from rlhf.models.folders import sha256_file
from rlhf.settings.run import Settings
from rlhf.sft import pretrain, tokens
from rlhf.sft.settings import PretrainSettings
from rlhf.supervisor.settings import RunSettings


def sentence(rng: random.Random) -> str:
    """The first word fixes the last: what a bigram cannot know."""
    subject, end = rng.choice([("Cats", "purr"), ("Dogs", "bark"), ("Owls", "hoot")])
    return f"{subject} {rng.choice(['always', 'never', 'often'])} {rng.choice(['loudly', 'softly'])} {end}."


def tiny_settings(tmp_path: Path, **changes: Any) -> Settings:
    rng = random.Random(0)
    paths = Settings(run=RunSettings(folder=tmp_path, name="r")).paths
    write_rows(paths.texts, [{"text": sentence(rng)} for _ in range(200)])
    write_rows(paths.heldout_texts, [{"text": sentence(rng)} for _ in range(30)])
    section = {
        "vocab_size": 290,
        "hidden_size": 16,
        "layers": 1,
        "heads": 2,
        "sequence_length": 16,
        "batch_size": 8,
        "steps": 8,
        "lr": 1e-2,
        **changes,
    }
    return Settings(run=RunSettings(folder=tmp_path, name="r"), pretrain=PretrainSettings(**section))


def test_perplexity_falls_below_the_bigrams_and_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, steps=150, hidden_size=32, layers=2)
    figures = pretrain.run(settings)
    assert figures["lm_perplexity"] < figures["bigram_perplexity"] < figures["lm_perplexity_before"]
    assert figures["lm_perplexity_before"] == pytest.approx(290, rel=0.5)
    assert figures["tokens"] == 150 * 8 * 16
    assert figures["tokens_per_s"] > 0
    model = AutoModelForCausalLM.from_pretrained(settings.paths.pretrained)
    tokenizer = AutoTokenizer.from_pretrained(settings.paths.pretrained)
    assert figures["parameters"] == model.num_parameters()
    ids = tokenizer("Owls often softly", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(answer[0]) == "Owls often softly hoot.<|end|>"
    assert not settings.paths.folder.joinpath("pretrained.training").exists()


def test_interrupted_stage_ends_with_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_settings(tmp_path / "a", checkpoint_every=3)
    pretrain.run(whole)
    settings = tiny_settings(tmp_path / "b", checkpoint_every=3)
    calls: list[int] = []

    def killed(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return tokens.nll_sum(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "nll_sum", killed)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain.run(settings)
    assert [path.name for path in (settings.paths.folder / "pretrained.training").iterdir()] == ["3"]
    assert not settings.paths.pretrained.exists()
    pretrain.run(settings)
    files = [each.paths.pretrained / "model.safetensors" for each in (whole, settings)]
    assert sha256_file(files[0]) == sha256_file(files[1])


def test_training_goes_on_from_a_given_folder(tmp_path: Path) -> None:
    first = tiny_settings(tmp_path, steps=40)
    figures = pretrain.run(first)
    more = tiny_settings(tmp_path, steps=4, init_from=first.paths.pretrained, out=tmp_path / "more")
    assert pretrain.run(more)["lm_perplexity_before"] == pytest.approx(figures["lm_perplexity"], rel=1e-5)
    assert (tmp_path / "more" / "tokenizer.json").is_file()


def test_twentieth_part_is_held_out_of_a_persons_own_texts(tmp_path: Path) -> None:
    rows = [{"body": f"text {number}"} for number in range(100)]
    write_rows(tmp_path / "mine.jsonl", rows)
    settings = tiny_settings(tmp_path, texts=str(tmp_path / "mine.jsonl"), text_field="body")
    texts, heldout = pretrain.read_texts(settings)
    assert (len(texts), len(heldout)) == (95, 5)
    assert sorted(texts + heldout) == sorted(row["body"] for row in rows)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match=r"mine\.jsonl: the texts have \d+ tokens, which do not fill one sequence"):
        pretrain.run(tiny_settings(tmp_path, texts=str(tmp_path / "mine.jsonl")))


def test_row_without_text_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r'mine\.jsonl:2: field "text" is missing'):
        pretrain.run(tiny_settings(tmp_path, texts=str(tmp_path / "mine.jsonl")))


def test_sequence_longer_than_the_given_models_context(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, steps=1, context=16)
    pretrain.run(settings)
    longer = tiny_settings(tmp_path, sequence_length=17, init_from=settings.paths.pretrained)
    with pytest.raises(SettingsError, match=r"17 is longer than the context of .*, 16"):
        pretrain.run(longer)
