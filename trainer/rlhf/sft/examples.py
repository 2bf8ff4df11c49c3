"""Demonstrations as token sequences of which only the completions are learned.

Rows are {"prompt", "completion"}, each text or chat messages, or {"messages"}. In a chat every turn of the assistant is
learned; where the row has a prompt and a completion, only the completion's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Row
from rlhf.sft.settings import SftSettings
from rlhf.sft.tokens import IGNORED, TokenArray, TokenBatch

Turn = Mapping[str, str]


@dataclass(frozen=True)
class Example:
    token_ids: TokenArray
    """[T], prompt and completion, the end token included."""
    learned_mask: NDArray[np.bool_]
    """[T], True = a token of a completion."""


@dataclass(frozen=True)
class Encoder:
    """Rows -> examples, for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    """Tokens that end a completion; the tokenizer's own is put where a completion has none."""
    max_length: int
    overlong: str
    """`refuse` or `truncate`, which cuts the end off."""

    def encode(self, row: Row) -> Example:
        """
        Raises:
            DataError: fields are missing or of another type, a chat meets a tokenizer without chat template or one
                that refuses it, or the example is too long; names file and line.
        """
        example = _joined(self._segments(row))
        length = len(example.token_ids)
        if length > self.max_length:
            if self.overlong == "refuse":
                raise row.error(
                    f"the example has {length} tokens, but {self.max_length} are allowed (sft.max_length and the "
                    'model\'s context); shorten it, or set sft.overlong = "truncate"'
                )
            example = Example(example.token_ids[: self.max_length], example.learned_mask[: self.max_length])
        if not example.learned_mask[1:].any():
            raise row.error("no token of a completion is left to learn")
        return example

    def _segments(self, row: Row) -> list[tuple[list[int], bool]]:
        if "messages" in row.fields:
            return self._chat(row, _turns(row, "messages"), first_learned=0)
        if isinstance(row.fields.get("prompt"), list):
            prompt, completion = _turns(row, "prompt"), _completion_turns(row)
            return self._chat(row, [*prompt, *completion], first_learned=len(prompt))
        completion_ids = self._tokens(row.text("completion"))
        prompt_ids = list(self.tokenizer(row.text("prompt")).input_ids)
        return [(prompt_ids, False), *self._answer(completion_ids, is_last=True)]

    def _chat(self, row: Row, turns: Sequence[Turn], first_learned: int) -> list[tuple[list[int], bool]]:
        """Alternately what the assistant is given and what it says, each with tokens of its own, as in generation."""
        segments: list[tuple[list[int], bool]] = []
        done = ""
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and index >= first_learned]
        for index in answers:
            given = self._rendered(row, turns[:index], answer_follows=True)
            said = self._rendered(row, turns[: index + 1], answer_follows=False)
            if not (given.startswith(done) and said.startswith(given)):
                raise row.error(
                    "the chat template writes earlier turns differently once later ones follow, so it cannot be told "
                    f'which tokens message {index + 1} has; split the chat into rows of "prompt" and "completion"'
                )
            segments.append((self._tokens(given.removeprefix(done)), False))
            segments += self._answer(self._tokens(said.removeprefix(given)), is_last=index == answers[-1])
            done = said
        if not segments:
            raise row.error('no message has the role "assistant", so there is nothing to learn')
        return segments

    def _rendered(self, row: Row, turns: Sequence[Turn], *, answer_follows: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise row.error(
                "holds chat messages, but the model's tokenizer has no chat template; use a chat model, or rows with "
                '"prompt" and "completion" text'
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answer_follows
                )
            )
        except jinja2.TemplateError as error:
            raise row.error(f"the chat template refuses the messages: {error}") from error

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _answer(self, token_ids: list[int], *, is_last: bool) -> list[tuple[list[int], bool]]:
        """Learned up to its end token; what a template puts behind that (a line break) is not. The last answer of a row
        gets the tokenizer's end token where it has none."""
        ends = [place for place, token_id in enumerate(token_ids) if token_id in self.end_ids]
        if ends:
            return [(token_ids[: ends[-1] + 1], True), (token_ids[ends[-1] + 1 :], False)]
        return [(token_ids + [int(self.tokenizer.eos_token_id)] * is_last, True)]


def example_batch(examples: Sequence[Example], pad_id: int) -> TokenBatch:
    """Right-padded; labels only where the next token is learned."""
    width = max(len(example.token_ids) for example in examples)
    ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    labels = np.full((len(examples), width), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        ids[row, :length] = example.token_ids
        labels[row, : length - 1] = np.where(example.learned_mask[1:], example.token_ids[1:], IGNORED)
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(labels))


def encoder(tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int], context: int, section: SftSettings) -> Encoder:
    return Encoder(tokenizer, end_ids, min(context, section.max_length), section.overlong)


def batches_of(examples: Sequence[Example], batch_size: int, pad_id: int) -> Iterator[TokenBatch]:
    """All examples once, in order."""
    for start in range(0, len(examples), batch_size):
        yield example_batch(examples[start : start + batch_size], pad_id)


def _joined(segments: Sequence[tuple[list[int], bool]]) -> Example:
    ids = np.concatenate([np.asarray(tokens, dtype=np.int32) for tokens, _ in segments])
    mask = np.concatenate([np.full(len(tokens), learned) for tokens, learned in segments])
    return Example(ids, mask)


def _turns(row: Row, field: str) -> list[Turn]:
    turns: list[Any] = row.require(field, list, "a list of chat messages")
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise row.error(f'each message of "{field}" needs a string "role" and a string "content", not {turn!r:.60}')
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _completion_turns(row: Row) -> list[Turn]:
    if isinstance(row.fields.get("completion"), list):
        return _turns(row, "completion")
    return [{"role": "assistant", "content": row.text("completion")}]
