from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data.rows import Row, write_rows
from rlhf.errors import DataError, SettingsError
from rlhf.models.causal import load_causal_lm, save_model
from rlhf.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf.settings.run import Settings
from rlhf.sft import finetune
from rlhf.sft.examples import Encoder, Example, example_batch
from rlhf.sft.settings import SftSettings
from rlhf.sft.tokens import nll_sum
from rlhf.supervisor.settings import RunSettings
from support.tiny import TEXTS, tiny_lm, tiny_lm_folder, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Good?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Quite."},
]
END = 0


def row(**fields: Any) -> Row:
    return Row(fields, "data.jsonl", 3)


def plain_encoder(max_length: int = 200, overlong: str = "refuse", template: str | None = None) -> Encoder:
    tokenizer = train_tokenizer(TEXTS * 3, 280)
    tokenizer.chat_template = template
    return Encoder(tokenizer, frozenset({END}), max_length, overlong)


def learned(encoder: Encoder, example: Example) -> str:
    return encoder.tokenizer.decode(example.token_ids[example.learned_mask])


def test_completion_and_end_token_are_learned_and_nothing_else() -> None:
    encoder = plain_encoder()
    example = encoder.encode(row(prompt="The film was", completion=" fine."))
    assert encoder.tokenizer.decode(example.token_ids) == "The film was fine.<|end|>"
    assert learned(encoder, example) == " fine.<|end|>"
    assert example.token_ids.tolist()[: -learned_count(example)] == encoder.tokenizer("The film was").input_ids


def learned_count(example: Example) -> int:
    return int(example.learned_mask.sum())


def test_end_token_that_is_there_is_not_doubled() -> None:
    example = plain_encoder().encode(row(prompt="a", completion="b<|end|>"))
    assert example.token_ids.tolist().count(END) == 1


def test_every_turn_of_the_assistant_is_learned_up_to_its_end_token() -> None:
    encoder = plain_encoder(template=TEMPLATE)
    example = encoder.encode(row(messages=CHAT))
    text = "<user>Good?\n<assistant>Yes.<|end|>\n<user>Sure?\n<assistant>Quite.<|end|>\n"
    assert encoder.tokenizer.decode(example.token_ids) == text
    assert learned(encoder, example) == "Yes.<|end|>Quite.<|end|>"


@pytest.mark.parametrize("completion", ["Quite.", CHAT[3:]])
def test_of_a_chat_prompt_and_completion_only_the_completion_is_learned(completion: Any) -> None:
    encoder = plain_encoder(template=TEMPLATE)
    example = encoder.encode(row(prompt=CHAT[:3], completion=completion))
    assert learned(encoder, example) == "Quite.<|end|>"


def test_prompt_of_a_chat_has_the_tokens_that_generation_starts_from() -> None:
    encoder = plain_encoder(template=TEMPLATE)
    example = encoder.encode(row(messages=CHAT[:2]))
    start = encoder.tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    assert example.token_ids.tolist()[: len(start)] == list(start)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": "a"}, 'field "completion" is missing'),
        ({"prompt": 3, "completion": "b"}, 'field "prompt" must be a string'),
        ({"messages": "hello"}, 'field "messages" must be a list'),
        ({"messages": [{"role": "user"}]}, 'needs a string "role" and a string "content"'),
        ({"messages": CHAT[:1]}, 'no message has the role "assistant"'),
        (
            {"messages": [{"role": "robot", "content": "x"}, CHAT[1]]},
            "the chat template refuses the messages: no robots",
        ),
        ({"prompt": "a " * 300, "completion": "b"}, "the example has 602 tokens, but 200 are allowed"),
    ],
)
def test_row_that_cannot_be_used_is_named(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{sentence}"):
        plain_encoder(template=TEMPLATE).encode(row(**fields))


def test_chat_without_a_chat_template_is_refused_with_its_line() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:3: holds chat messages, but the model's tokenizer has no chat"):
        plain_encoder().encode(row(messages=CHAT))


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="writes earlier turns differently"):
        plain_encoder(template=rewriting).encode(row(messages=CHAT))


def test_overlong_rows_are_cut_where_asked_and_refused_if_nothing_is_left() -> None:
    encoder = plain_encoder(max_length=12, overlong="truncate")
    assert len(encoder.encode(row(prompt="abc", completion=" defghijklmnopqrstuvwxyz")).token_ids) == 12
    with pytest.raises(DataError, match=r"data\.jsonl:3: no token of a completion is left to learn"):
        encoder.encode(row(prompt="abcdefghijklmnopqrstuvwxyz", completion="1"))


def test_labels_are_the_next_learned_tokens_and_padding_has_none() -> None:
    encoder = plain_encoder()
    examples = [encoder.encode(row(prompt="ab", completion=text)) for text in ("c", "defg")]
    batch = example_batch(examples, pad_id=1)
    for place, example in enumerate(examples):
        labels = batch.labels[place][batch.labels[place] != -100]
        assert labels.tolist() == example.token_ids[example.learned_mask].tolist()
    assert batch.weight == sum(map(learned_count, examples))


def test_neither_prompt_labels_nor_padding_touch_loss_or_gradients() -> None:
    """Tokens of the prompt count as input only: no logit at an unlearned position gets a gradient."""
    encoder, model = plain_encoder(), tiny_lm()
    examples = [encoder.encode(row(prompt="The film", completion=text)) for text in (" was", " was very slow")]
    batch = example_batch(examples, pad_id=1)
    kept: list[torch.Tensor] = []

    def keep(_: object, __: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model.lm_head.register_forward_hook(keep)
    loss = nll_sum(model, batch)
    loss.backward()
    unlearned = batch.labels == -100
    assert float(kept[0].grad[unlearned].abs().max()) == 0.0
    assert float(kept[0].grad[~unlearned].abs().max()) > 0.0
    torch.testing.assert_close(nll_sum(model, example_batch(examples, pad_id=77)), loss)


def demonstrations(tmp_path: Path) -> Settings:
    tiny_lm_folder(tmp_path / "start")
    rows = [{"prompt": f"Film {number}:", "completion": " slow."} for number in range(60)]
    write_rows(tmp_path / "demos.jsonl", rows)
    section = SftSettings(
        data=str(tmp_path / "demos.jsonl"), model=tmp_path / "start", lr=1e-2, epochs=25, heldout_fraction=0.1
    )
    return Settings(run=RunSettings(folder=tmp_path, name="r"), sft=section)


def test_fine_tuned_model_says_what_was_shown_and_ends(tmp_path: Path) -> None:
    settings = demonstrations(tmp_path)
    figures = finetune.run(settings)
    assert (figures["examples"], figures["heldout_examples"], figures["steps"]) == (54, 6, 100)
    assert figures["heldout_loss"] < 0.3 < figures["heldout_loss_before"]
    model, tokenizer = load_causal_lm(settings.paths.sft), load_tokenizer(settings.paths.sft)
    ids = tokenizer("Film 7:", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert tokenizer.decode(answer[0]) == "Film 7: slow.<|end|>"


def test_held_out_rows_are_never_trained_on() -> None:
    examples = [Example(torch.tensor([n]).numpy(), torch.tensor([True]).numpy()) for n in range(40)]
    training, heldout = finetune.split(examples, SftSettings(heldout_fraction=0.25))
    assert len(heldout) == 10
    assert sorted(int(each.token_ids[0]) for each in training + heldout) == list(range(40))
    assert finetune.split(examples, SftSettings(heldout_fraction=0.0))[1] == []


def test_without_data_the_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"sft\.data: names no data"):
        finetune.run(Settings(run=RunSettings(folder=tmp_path)))


def test_rows_longer_than_the_models_context_are_refused(tmp_path: Path) -> None:
    save_model(tiny_lm(context=16), tiny_tokenizer(), tmp_path / "start")
    write_rows(tmp_path / "demos.jsonl", [{"prompt": "The film was", "completion": " much too long for it."}] * 3)
    section = SftSettings(data=str(tmp_path / "demos.jsonl"), model=tmp_path / "start")
    with pytest.raises(DataError, match=r"demos\.jsonl:1: the example has \d+ tokens, but 16 are allowed"):
        finetune.run(Settings(run=RunSettings(folder=tmp_path), sft=section))
