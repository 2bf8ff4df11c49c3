"""The reward model: a transformers sequence classifier with one label, and how its scores are normalised.

The folder is an ordinary `AutoModelForSequenceClassification` folder with `reward_model.json` beside it. Plain
transformers gives the same raw scores, except where it takes a text's own tokens for padding: it compares ids, this
module reads the mask.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ModelError
from rlhf.models.causal import load_causal_lm
from rlhf.models.folders import read_json, replacing_folder, write_json
from rlhf.models.pretrained import load_pretrained

FACTS_FILE = "reward_model.json"
REFERENCE_SET_FILE = "reference_set.jsonl"


def ended(token_ids: Sequence[int], end_token_id: int | None, context_tokens: int | None = None) -> list[int]:
    """What a reward model reads of a sequence: its tokens and exactly one end token behind them, if there is room.

    Annotators judge a text, whether the policy ended it or was cut off, so the score of both is read at an end token;
    penalties for being cut off are the trainer's. A sequence that fills the model's context is read at its own last
    token instead. Training, the service and the evaluation all read through here.

    Args:
        context_tokens: of the reward model; None: it knows no limit.
    """
    over = len(token_ids) > 0 and token_ids[-1] == end_token_id
    full = context_tokens is not None and len(token_ids) >= context_tokens
    if end_token_id is None or over or full:
        return list(token_ids)
    return [*token_ids, end_token_id]


class RewardModel(nn.Module):
    """Scores sequences: (raw - mean) / std, with mean and std of a frozen reference set.

    `facts` is the rest of reward_model.json: hashes of the reference set and the comparisons, figures.
    """

    def __init__(self, classifier: PreTrainedModel, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.mean = mean
        self.std = std
        self.facts: dict[str, Any] = {}
        self._takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters

    @classmethod
    def new(cls, causal_folder: str | Path, *, seed: int = 0, device: str = "cpu", dtype: str = "float32") -> Self:
        """The language model's trunk under a new head ~ N(0, 1/(d + 1)) without bias.

        Source of the head's scale: lm-human-preferences, `utils/core.py`, as in Ziegler et al. 2019.

        Raises:
            ModelError: the folder holds no causal language model, or one of a family without a sequence classifier.
        """
        causal = load_causal_lm(causal_folder, device=device, dtype=dtype)
        classifier = _classifier_over(causal, Path(causal_folder))
        _head_of(classifier, Path(causal_folder))
        classifier.eval()  # type: ignore[no-untyped-call]
        model = cls(classifier)
        model.draw_head(seed)
        return model

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Self:
        """
        Raises:
            ModelError: missing, truncated, no sequence classifier with one label, or without its normalisation.
        """
        folder = Path(folder)
        classifier = load_pretrained(AutoModelForSequenceClassification, "sequence classifier", folder, device, dtype)
        _head_of(classifier, folder)
        if not (folder / FACTS_FILE).is_file():
            raise ModelError(
                f"{folder}: has no {FACTS_FILE}, which says how scores are normalised; for a classifier of your own "
                'write {"mean": 0, "std": 1} into it, or what its scores on completions of the initial policy have'
            )
        facts = read_json(folder / FACTS_FILE)
        mean, std = _normalisation(facts, folder)
        model = cls(classifier, mean, std)
        model.facts = {name: value for name, value in facts.items() if name not in ("mean", "std")}
        return model

    def save(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        reference_set: Iterable[Mapping[str, str]] = (),
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """
        Args:
            reference_set: what `mean` and `std` are of, kept as JSON Lines so that a later model can be normalised on
                the same.
            beside: writes what else belongs into the folder; None: nothing.

        Raises:
            StorageError: the disk is full or the folder cannot be written; the old folder stays.
        """
        self.classifier.config.pad_token_id = tokenizer.pad_token_id
        with replacing_folder(Path(folder)) as temporary:
            self.classifier.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / FACTS_FILE, {"mean": self.mean, "std": self.std, **self.facts})
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in reference_set]
            if lines:
                (temporary / REFERENCE_SET_FILE).write_text("".join(lines), encoding="utf-8")
            if beside is not None:
                beside(temporary)

    @property
    def trunk(self) -> PreTrainedModel:
        """Everything below the head."""
        return self.classifier.base_model  # type: ignore[return-value]

    @property
    def head(self) -> nn.Linear:
        """[1, H], no bias."""
        return self.classifier.score  # type: ignore[return-value]

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence that it reads; None: the architecture knows no limit."""
        return getattr(self.classifier.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.no_grad()
    def draw_head(self, seed: int) -> None:
        """Gives it the head that a new model of this seed has."""
        weight = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.head.weight.copy_(weight / math.sqrt(self.head.in_features + 1))

    def normalise(self, raw_scores: Tensor) -> None:
        """Sets mean and std so that these raw scores, of the frozen reference set, become mean 0 and std 1.

        Raises:
            ModelError: they hardly differ, so dividing by their spread would only magnify noise.
        """
        mean, std = normalisation_of(raw_scores)
        self.mean, self.std = float(mean), float(std)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normalised scores.

        Args:
            input_ids: [B, T] int64, padded on either side.
            attention_mask: [B, T] bool, True = a token of the sequence.

        Returns:
            [B] float32.
        """
        return (self.raw_scores(input_ids, attention_mask) - self.mean) / self.std

    def raw_scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B] float32: the head's output at each sequence's last token, before normalisation."""
        return self._apply_head(self.last_hidden(input_ids, attention_mask))

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, H]: below the head, at each sequence's last token."""
        return at_last_token(self.hidden(input_ids, attention_mask), attention_mask)

    def token_values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] float32: the head's raw output at every token; meaningless where the mask is False."""
        return self._apply_head(self.hidden(input_ids, attention_mask))

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T, H]: below the head."""
        # From the mask, so that padding on the left shifts nothing.
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        extra = {"position_ids": positions} if self._takes_positions else {}
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False, **extra)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _apply_head(self, hidden: Tensor) -> Tensor:
        """In float32 under any autocast: differences of scores are the quantity that matters."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.head.weight.float()).squeeze(-1)


def at_last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, H] -> [B, H]"""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * positions).amax(1)
    return hidden[torch.arange(len(last), device=last.device), last]


def normalisation_of(raw_scores: Tensor) -> tuple[Tensor, Tensor]:
    """[N, ...] -> [...] float64: mean and standard deviation over the reference set.

    Raises:
        ModelError: a standard deviation below 1e-3: the scores hardly differ, and dividing would only magnify noise.
    """
    mean, std = raw_scores.double().mean(0), raw_scores.double().std(0)
    if not bool((std >= 1e-3).all()):
        raise ModelError(
            f"the reward model scores its whole reference set alike (standard deviation {float(std.min()):.2g})"
        )
    return mean, std


def _classifier_over(causal: PreTrainedModel, folder: Path) -> PreTrainedModel:
    config = causal.config
    config.num_labels = 1
    try:
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=causal.dtype)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ModelError(f"{folder}: transformers has no sequence classifier for {config.model_type}") from error
    setattr(classifier, classifier.base_model_prefix, causal.base_model)
    return classifier.to(causal.device)  # type: ignore[no-any-return]


def _head_of(classifier: PreTrainedModel, folder: Path) -> nn.Linear:
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise ModelError(f"{folder}: a sequence classifier with one label and a head `score` without bias is needed")
    return head


def _normalisation(facts: Mapping[str, Any], folder: Path) -> tuple[float, float]:
    try:
        mean, std = float(facts["mean"]), float(facts["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / FACTS_FILE}: numbers `mean` and `std` expected") from error
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ModelError(f"{folder / FACTS_FILE}: finite mean and std > 0 expected, {mean} and {std} received")
    return mean, std
