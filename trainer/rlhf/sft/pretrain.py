"""`rlhf pretrain`: language modelling on texts, with a new tokenizer and model or from a given folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.rows import read_rows
from rlhf.errors import DataError, ModelError, SettingsError
from rlhf.models.causal import load_causal_lm, new_causal_lm, save_model
from rlhf.models.compute import set_threads, torch_device
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256, train_tokenizer
from rlhf.settings.run import Settings
from rlhf.sft.bigram import bigram_perplexity
from rlhf.sft.loop import Job, Trained, remove_training_state, state_folder_of, train
from rlhf.sft.packing import PackedRows, stream_in_order, token_stream
from rlhf.sft.settings import PretrainSettings
from rlhf.sft.tokens import TokenArray, encode_texts, mean_nll, nll_sum, perplexity

logger = logging.getLogger(__name__)

HELDOUT_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """Token streams, documents ended by the end token."""

    train: TokenArray
    heldout: TokenArray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.heldout.tobytes()).hexdigest()


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the `from_pretrained` folder and returns its figures.

    Raises:
        DataError: texts that cannot be used, or too few of them.
        ModelError, SettingsError, StorageError, StageFailed: see `rlhf.sft.loop.train` and `rlhf.models`.
    """
    section, out = settings.pretrain, settings.pretrain.out or settings.paths.pretrained
    set_threads(section.threads)
    texts, heldout_texts = read_texts(settings)
    model, tokenizer = start(section, texts)
    corpus = encode(section, tokenizer, texts, heldout_texts)
    before = heldout_perplexity(model, corpus, section)
    trained = train(_job(settings, model, tokenizer, corpus, out))
    after = heldout_perplexity(model, corpus, section)
    save_model(model, tokenizer, out)
    remove_training_state(state_folder_of(out))
    return {
        "lm_perplexity_before": before,
        "lm_perplexity": after,
        "bigram_perplexity": bigram_perplexity(corpus.train, corpus.heldout, len(tokenizer)),
        **_figures(trained, model, corpus),
    }


def read_texts(settings: Settings) -> tuple[list[str], list[str]]:
    """Texts for training and for perplexity; without a held-out file, every twentieth of a seeded order is held out."""
    section = settings.pretrain
    texts = _texts(section.texts or settings.paths.texts, section.text_field)
    heldout = section.heldout_texts or ("" if section.texts else settings.paths.heldout_texts)
    order = np.random.default_rng(section.seed).permutation(len(texts))
    shuffled = [texts[index] for index in order]
    if heldout:
        return shuffled, _texts(heldout, section.text_field)
    if len(texts) < 2:
        raise DataError("one text alone cannot be both trained on and held out", path=section.texts)
    count = max(1, round(len(texts) * HELDOUT_SHARE))
    return shuffled[count:], shuffled[:count]


def start(section: PretrainSettings, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, float32 and in training mode, and its tokenizer."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if section.init_from is not None:
        model, tokenizer = load_causal_lm(section.init_from, device=section.device), load_tokenizer(section.init_from)
        context = getattr(model.config, "max_position_embeddings", section.sequence_length)
        if section.sequence_length > context:
            raise SettingsError(
                f"pretrain.sequence_length: {section.sequence_length} is longer than the context of "
                f"{section.init_from}, {context}"
            )
    else:
        tokenizer = train_tokenizer(texts, section.vocab_size)
        model = new_causal_lm(section, tokenizer)
        model.to(torch_device(section.device))  # type: ignore[arg-type]
    return model.train(), tokenizer


def encode(
    section: PretrainSettings, tokenizer: PreTrainedTokenizerBase, texts: list[str], heldout_texts: list[str]
) -> Corpus:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{section.init_from}: its tokenizer has no end token, which must stand between documents")
    train_stream, heldout = (
        token_stream(encode_texts(tokenizer, some), tokenizer.eos_token_id) for some in (texts, heldout_texts)
    )
    if len(train_stream) <= section.sequence_length:
        raise DataError(
            f"the texts have {len(train_stream)} tokens, which do not fill one sequence of "
            f"{section.sequence_length}; give more text or lower pretrain.sequence_length",
            path=section.texts or "the run's texts",
        )
    return Corpus(train_stream, heldout)


def heldout_perplexity(model: PreTrainedModel, corpus: Corpus, section: PretrainSettings) -> float:
    batches = stream_in_order(corpus.heldout, section.sequence_length, section.batch_size)
    return perplexity(mean_nll(model, batches, section))


def _job(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, out: Path
) -> Job[Any]:
    section = settings.pretrain
    rows = PackedRows(corpus.train, section.sequence_length, section.batch_size, section.seed)
    return Job(
        name="pretrain",
        model=model,
        loss=lambda batch: nll_sum(model, batch),
        micro_batch=rows.micro_batch,
        micro_batches=section.steps * section.gradient_accumulation,
        settings=section,
        state_folder=state_folder_of(out),
        tensorboard=settings.paths.tensorboard / "pretrain",
        data={"corpus": corpus.sha256, "tokenizer": tokenizer_sha256(tokenizer)},
    )


def _figures(trained: Trained, model: PreTrainedModel, corpus: Corpus) -> dict[str, Any]:
    return {
        "train_loss": trained.loss,
        "steps": trained.steps,
        "tokens": int(trained.weight),
        "tokens_per_s": trained.weight / trained.seconds,
        "corpus_tokens": len(corpus.train),
        "heldout_tokens": len(corpus.heldout) - 1,
        "parameters": model.num_parameters(),
    }


def _texts(source: str | Path, field: str) -> list[str]:
    return [row.text(field) for row in read_rows(source)]
