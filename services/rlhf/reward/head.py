"""A reward model with its tokenizer, as functions of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf.models.causal import weights_sha256
from rlhf.models.compute import set_threads
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel, ended
from rlhf.models.tokenizer import load_tokenizer, pad_token_id, tokenizer_sha256
from rlhf.reward.requests import Texts, TokenItem
from rlhf.reward.scorer import About, Reading, Score
from rlhf.wire.records import Floats


class RewardHead:
    """Everything here runs in the worker thread."""

    def __init__(self, model: RewardModel, tokenizer: PreTrainedTokenizerBase, about: About) -> None:
        self.about = about
        self._model = model
        self._tokenizer = tokenizer
        self._pad_id = pad_token_id(tokenizer)
        self.vocab_size: int = model.classifier.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
        self.max_context_tokens = model.context_tokens
        """None: the architecture knows no limit."""

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, threads: int) -> RewardHead:
        """
        Raises:
            ModelError: the folder holds no reward model.
        """
        set_threads(threads)
        model, tokenizer = RewardModel.load(folder, device=device, dtype=dtype), load_tokenizer(folder)
        about = About("model", weights_sha256(folder), tokenizer_sha256(tokenizer), model.mean, model.std)
        return cls(model, tokenizer, about)

    def encode(self, texts: Sequence[Texts]) -> tuple[TokenItem, ...]:
        """Prompt and completion are encoded apart, so that the end of one does not merge with the start of the other,
        as it never does where a policy generates."""
        return tuple(self._encode(item) for item in texts)

    def reading(self, item: TokenItem) -> Reading:
        """The item as the model was trained to read it: up to one end token, whether it was ended or cut off, or up to
        its last token where it fills the context."""
        token_ids = ended(item.token_ids.tolist(), self._tokenizer.eos_token_id, self.max_context_tokens)
        return Reading(np.asarray(token_ids, dtype=np.int64), item.prompt_length, len(item.token_ids))

    def forward(self, readings: Sequence[Reading]) -> list[Score]:
        """Normalised values at every token; the last one's is the score."""
        ids, mask = pad([reading.token_ids for reading in readings], self._pad_id)
        device = self._model.device
        with torch.inference_mode():
            raw = self._model.token_values(ids.to(device), mask.to(device))
            values = ((raw - self._model.mean) / self._model.std).float().cpu().numpy()
        return [_score(row, reading) for row, reading in zip(values, readings, strict=True)]

    def _encode(self, item: Texts) -> TokenItem:
        prompt = self._tokenizer(item.prompt).input_ids if item.prompt else []
        completion = self._tokenizer(item.completion, add_special_tokens=False).input_ids if item.completion else []
        return TokenItem(np.asarray([*prompt, *completion], dtype=np.int64), len(prompt))


def _score(values: Floats, reading: Reading) -> Score:
    # Copies, since a view would keep the whole batch's array.
    return Score(float(values[len(reading.token_ids) - 1]), values[reading.prompt_length : reading.length].copy())
