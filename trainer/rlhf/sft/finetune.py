"""`rlhf sft`: supervised fine-tuning on demonstrations, with the loss on their completions only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from rlhf.data.rows import read_rows
from rlhf.errors import DataError, ModelError, SettingsError
from rlhf.models.causal import load_causal_lm, save_model
from rlhf.models.compute import set_threads
from rlhf.models.tokenizer import end_token_ids, load_tokenizer, pad_token_id
from rlhf.settings.run import Settings
from rlhf.sft.batches import batches_per_epoch, shuffled_batches
from rlhf.sft.examples import Example, batches_of, encoder, example_batch
from rlhf.sft.loop import Job, remove_training_state, state_folder_of, train
from rlhf.sft.settings import SftSettings
from rlhf.sft.tokens import mean_nll, nll_sum, perplexity


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the `from_pretrained` folder and returns its figures.

    Raises:
        SettingsError: no data named.
        DataError: a row that cannot be used, with file and line.
        ModelError, StorageError, StageFailed: see `rlhf.sft.loop.train` and `rlhf.models`.
    """
    section, out = settings.sft, settings.sft.out or settings.paths.sft
    if not section.data:
        raise SettingsError("sft.data: names no data; give a JSONL or Parquet file, or the name of a dataset")
    set_threads(section.threads)
    folder = section.model or settings.paths.pretrained
    model, tokenizer = load_causal_lm(folder, device=section.device), load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: its tokenizer has no end token, which a completion must end with")
    context = int(getattr(model.config, "max_position_embeddings", section.max_length))
    encode = encoder(tokenizer, end_token_ids(model, tokenizer), context, section).encode
    training, heldout = split([encode(row) for row in read_rows(section.data)], section)
    pad_id = pad_token_id(tokenizer)
    before = _heldout_figures(model, heldout, pad_id, section, "_before")
    trained = train(_job(settings, model.train(), training, pad_id, out))
    after = _heldout_figures(model, heldout, pad_id, section, "")
    save_model(model, tokenizer, out)
    remove_training_state(state_folder_of(out))
    counts = {"examples": len(training), "heldout_examples": len(heldout), "steps": trained.steps}
    speed = {"train_loss": trained.loss, "learned_tokens_per_s": trained.weight / trained.seconds}
    return before | after | counts | speed


def split(examples: Sequence[Example], section: SftSettings) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, by a seeded draw."""
    count = round(len(examples) * section.heldout_fraction)
    if count >= len(examples):
        raise DataError("too few rows to keep some for the held-out loss", path=section.data)
    order = np.random.default_rng(section.seed).permutation(len(examples))
    heldout = set(order[:count].tolist())
    return (
        [example for index, example in enumerate(examples) if index not in heldout],
        [examples[index] for index in sorted(heldout)],
    )


def _job(settings: Settings, model: PreTrainedModel, examples: list[Example], pad_id: int, out: Path) -> Job[Any]:
    section = settings.sft
    per_epoch = batches_per_epoch(len(examples), section.batch_size)
    batch = shuffled_batches(examples, section.batch_size, section.seed)
    return Job(
        name="sft",
        model=model,
        loss=lambda batch: nll_sum(model, batch),
        micro_batch=lambda index: example_batch(batch(index), pad_id),
        micro_batches=per_epoch * section.epochs,
        settings=section,
        state_folder=state_folder_of(out),
        tensorboard=settings.paths.tensorboard / "sft",
        data={"examples": _sha256(examples)},
    )


def _heldout_figures(
    model: PreTrainedModel, heldout: list[Example], pad_id: int, section: SftSettings, suffix: str
) -> dict[str, float]:
    """None are held out: no figures."""
    if not heldout:
        return {}
    nll = mean_nll(model, batches_of(heldout, section.batch_size, pad_id), section)
    return {f"heldout_loss{suffix}": nll, f"heldout_perplexity{suffix}": perplexity(nll)}


def _sha256(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.int64(len(example.token_ids)).tobytes())
        digest.update(example.token_ids.tobytes() + example.learned_mask.tobytes())
    return digest.hexdigest()
