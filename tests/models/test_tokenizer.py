from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import ModelError, SettingsError
from rlhf.models.tokenizer import end_token_ids, load_tokenizer, pad_token_id, tokenizer_sha256, train_tokenizer
from support.tiny import TEXTS, tiny_lm, tiny_tokenizer


@given(st.text(max_size=40))
def test_every_text_comes_back(text: str) -> None:
    ids = tiny_tokenizer()(text.replace("<|", "")).input_ids
    assert tiny_tokenizer().decode(ids) == text.replace("<|", "")


def test_end_and_pad_are_two_tokens_of_their_own() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer("<|end|>").input_ids == [tokenizer.eos_token_id]


def test_training_twice_gives_the_same_tokenizer() -> None:
    hashes = {tokenizer_sha256(train_tokenizer(TEXTS * 3, 290)) for _ in range(2)}
    assert len(hashes) == 1


def test_hash_survives_saving_padding_and_truncation_but_not_another_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 3, 280)
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(load_tokenizer(tmp_path)) == before
    assert tokenizer_sha256(train_tokenizer(TEXTS * 3, 281)) != before
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer_sha256(tokenizer) != before


def test_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least 258 expected"):
        train_tokenizer(TEXTS, 257)


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path}: has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no such model folder"):
        load_tokenizer(tmp_path / "absent")


def test_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match=f"{tmp_path}: its tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_end_tokens_are_the_models_and_the_tokenizers() -> None:
    model, tokenizer = tiny_lm(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    assert end_token_ids(model, tokenizer) == {7, 9, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = None
    assert end_token_ids(model, tokenizer) == {tokenizer.eos_token_id}


def test_pad_id_without_pad_token_is_the_end_token() -> None:
    tokenizer = train_tokenizer(TEXTS * 3, 280)
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
