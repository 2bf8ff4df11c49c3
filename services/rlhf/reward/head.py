"""A reward model with its tokenizer, as functions of token sequences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf.models.compute import set_threads
from rlhf.models.ensemble import RewardEnsemble, reward_sha256
from rlhf.models.padding import pad
from rlhf.models.reward import ended
from rlhf.models.tokenizer import load_tokenizer, pad_token_id, tokenizer_sha256
from rlhf.reward.aggregate import Aggregation
from rlhf.reward.requests import Texts, TokenItem
from rlhf.reward.scores import About, Reading, Score
from rlhf.wire.records import Floats

_log = logging.getLogger(__name__)

PLAIN_MEAN = Aggregation()


class RewardHead:
    """Everything here runs in the worker thread."""

    def __init__(
        self,
        model: RewardEnsemble,
        tokenizer: PreTrainedTokenizerBase,
        about: About,
        aggregation: Aggregation = PLAIN_MEAN,
    ) -> None:
        self.about = about
        self.max_context_tokens = model.first.context_tokens
        """None: the architecture knows no limit."""
        embeddings = model.first.classifier.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]  # type: ignore[index, assignment]
        self._model = model
        self._tokenizer = tokenizer
        self._pad_id = pad_token_id(tokenizer)
        reference = model.reference_scores
        self._aggregation = aggregation if reference is None else aggregation.scaled_on(reference.cpu().numpy())

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str,
        dtype: str,
        threads: int,
        aggregation: Aggregation = PLAIN_MEAN,
    ) -> RewardHead:
        """
        Raises:
            ModelError: the folder holds no reward model.
        """
        set_threads(threads)
        model, tokenizer = RewardEnsemble.load(folder, device=device, dtype=dtype), load_tokenizer(folder)
        about = About(
            kind="model",
            model_sha256=reward_sha256(folder),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            mean=model.first.mean,
            std=model.first.std,
            members=model.members,
        )
        if model.members > 1 or model.heads.groups > 1:
            _log.info(
                "%d members (%s), %d groups (%s)",
                *(model.members, aggregation.how, model.heads.groups, model.heads.combine),
            )
        return cls(model, tokenizer, about, aggregation)

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
        device = self._model.first.device
        with torch.inference_mode():
            values = self._model.token_values(ids.to(device), mask.to(device)).float().cpu().numpy()
        return [self._score(row, reading) for row, reading in zip(values, readings, strict=True)]

    def _encode(self, item: Texts) -> TokenItem:
        prompt = self._tokenizer(item.prompt).input_ids if item.prompt else []
        completion = self._tokenizer(item.completion, add_special_tokens=False).input_ids if item.completion else []
        return TokenItem(np.asarray([*prompt, *completion], dtype=np.int64), len(prompt))

    def _score(self, values: Floats, reading: Reading) -> Score:
        """
        Args:
            values: [T, M]
        """
        # Copies, since a view would keep the whole batch's array.
        members = values[len(reading.token_ids) - 1].copy()
        tokens = self._aggregation(values[reading.prompt_length : reading.length]).copy()
        return Score(float(self._aggregation(members)), tokens, members)
