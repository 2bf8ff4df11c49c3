"""`rlhf data`: a folder of real texts, split into what each stage of a run may see.

    corpus.jsonl    {"text"}            ─▶ texts, held-out texts, and the first words of their sentences as prompts
    labelled.jsonl  {"text", "label"}   ─▶ one half for the simulated annotators, the other for the judge

Held-out and validation prompts begin held-out texts, each another; no text is on two sides.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf.data.rows import read_rows, write_rows
from rlhf.data.sentiment import read_labelled
from rlhf.data.settings import DataSettings
from rlhf.errors import DataError, SettingsError
from rlhf.settings.run import Settings

_Value = TypeVar("_Value", str, tuple[str, str])

_log = logging.getLogger(__name__)


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the run's texts, prompts and labelled texts, and returns their numbers.

    Raises:
        SettingsError: no folder is set.
        DataError: a file is missing, a row cannot be used, or there are too few texts for the prompts asked for.
    """
    section, paths = settings.data, settings.paths
    folder = _folder(section)
    rng = random.Random(section.seed)
    texts = _shuffled((row.text("text") for row in read_rows(folder / "corpus.jsonl")), rng)
    labelled = _shuffled(read_labelled(folder / "labelled.jsonl"), rng)
    if len(texts) <= section.heldout_texts:
        raise DataError(
            f"has {len(texts)} different texts, no more than data.heldout_texts", path=folder / "corpus.jsonl"
        )
    heldout, training = texts[: section.heldout_texts], texts[section.heldout_texts :]
    unseen = _beginnings(heldout, section, rng)
    seen = _without(_beginnings(training, section, rng), unseen)
    rows: dict[Path, list[dict[str, str]]] = {
        paths.texts: [{"text": text} for text in training],
        paths.heldout_texts: [{"text": text} for text in heldout],
        paths.prompts: _prompts("prompts", seen, section.prompts),
        paths.heldout_prompts: _prompts("heldout_prompts", unseen, section.heldout_prompts),
        paths.validation_prompts: _prompts(
            "validation_prompts", unseen[section.heldout_prompts :], section.validation_prompts
        ),
        paths.annotators_labelled: _labelled_rows(labelled[::2]),
        paths.labelled: _labelled_rows(labelled[1::2]),
    }
    numbers = {path.stem: write_rows(path, some) for path, some in rows.items()}
    _log.info("split %s into %s", folder, paths.texts.parent)
    return numbers


def _folder(section: DataSettings) -> Path:
    if section.folder is None:
        raise SettingsError("data.folder: not set; name the folder that holds corpus.jsonl and labelled.jsonl")
    return section.folder


def _shuffled(values: Iterable[_Value], rng: random.Random) -> list[_Value]:
    """Without repetitions, in an order that follows from the seed alone."""
    different = list(dict.fromkeys(values))
    rng.shuffle(different)
    return different


def _beginnings(texts: Sequence[str], section: DataSettings, rng: random.Random) -> list[str]:
    """The first words of each text that is longer than that; no two alike."""
    shortest, longest = section.prompt_words
    beginnings = []
    for text in texts:
        words, count = text.split(), rng.randint(shortest, longest)
        if len(words) > count:
            beginnings.append(" ".join(words[:count]))
    return list(dict.fromkeys(beginnings))


def _without(beginnings: Sequence[str], others: Iterable[str]) -> list[str]:
    left_out = set(others)
    return [beginning for beginning in beginnings if beginning not in left_out]


def _prompts(name: str, beginnings: Sequence[str], count: int) -> list[dict[str, str]]:
    """
    Raises:
        SettingsError: there are fewer.
    """
    if len(beginnings) < count:
        raise SettingsError(f"data.{name}: the texts give only {len(beginnings)} of {count} prompts; ask for fewer")
    return [{"prompt": beginning} for beginning in beginnings[:count]]


def _labelled_rows(labelled: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in labelled]
