"""Prompts from plain text and chat messages, and their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.data.prompts import Message, Prompt, encode_prompt, read_prompts
from rlhf.errors import DataError, ModelError

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_messages_and_metadata(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "Once ", "answer": "42", "level": 3, "easy": True, "gone": None, "tags": ["a"]},
        {"prompt": turns},
        {"messages": turns, "answer": "so"},
    )
    plain, chat, named = read_prompts(path)
    assert plain == Prompt("Once ", None, {"answer": "42", "level": "3", "easy": "true"})
    assert chat.messages == (Message("system", "Be brief."), Message("user", "Why?"))
    assert chat.text == "system: Be brief.\nuser: Why?"
    assert (named.messages, named.metadata) == (chat.messages, {"answer": "so"})


def test_limit_takes_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    assert [prompt.text for prompt in read_prompts(path, limit=2)] == ["a", "b"]
    assert len(read_prompts(path)) == 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "no prompt"}, 'field "prompt" is missing'),
        ({"prompt": 3}, "must be a string"),
        ({"prompt": ""}, "is empty"),
        ({"messages": []}, "holds no messages"),
        ({"messages": "hello"}, "a list of messages"),
        ({"messages": [{"role": "user"}]}, 'needs a string "role" and a string "content"'),
        ({"messages": ["hello"]}, 'needs a string "role" and a string "content"'),
    ],
)
def test_a_row_without_a_prompt_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "good"}, row)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert said in str(caught.value)


def test_plain_text_is_encoded_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(Prompt("Hé", None, {}), tokenizer)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "Hé"
    assert ids.shape == (3,)


def test_messages_go_through_the_template_up_to_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    ids = encode_prompt(Prompt("", (Message("user", "hi"),), {}), tokenizer)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "[user]hi[assistant]"


def test_messages_need_a_template_that_takes_them(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Prompt("", (Message("wizard", "hi"),), {})
    with pytest.raises(ModelError, match="has no chat template"):
        encode_prompt(chat, tokenizer)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(DataError, match="unknown role"):
        encode_prompt(chat, tokenizer)


def test_a_prompt_without_tokens_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="has no tokens"):
        encode_prompt(Prompt("", None, {}), tokenizer)
