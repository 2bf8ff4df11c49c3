"""Completions sampled for ranking: one prompt with its K completions a row. Written by `rlhf sample`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.data.rows import Row, read_rows, write_rows
from rlhf.wire.records import FinishReason, Sampling, WeightVersion


@dataclass(frozen=True)
class SampledCompletion:
    text: str
    token_ids: tuple[int, ...]
    """[R], the end token included where one was sampled."""
    logprobs: tuple[float, ...]
    """[R], at the sampling temperature."""
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True)
class Sampled:
    prompt_index: int
    """Position in the file of prompts, from 0."""
    prompt: str
    metadata: dict[str, str]
    """From the prompt's row."""
    completions: tuple[SampledCompletion, ...]
    sampling: Sampling
    version: WeightVersion
    """Whose completions these are."""


def write_samples(path: Path, samples: Iterable[Sampled]) -> int:
    """Writes JSON Lines and returns the number of rows; raises StorageError as `write_rows` does."""
    return write_rows(path, map(_to_fields, samples))


def read_samples(source: str | Path) -> list[Sampled]:
    """What `write_samples` wrote.

    Raises:
        DataError: a row is not one; names file and line.
    """
    return [_from_row(row) for row in read_rows(source)]


def _to_fields(sampled: Sampled) -> dict[str, Any]:
    fields = asdict(sampled)
    for completion in fields["completions"]:
        completion["finish_reason"] = completion["finish_reason"].name.lower()
    return fields


def _from_row(row: Row) -> Sampled:
    completions = row.require("completions", list, "a list of completions")
    try:
        return Sampled(
            prompt_index=row.require("prompt_index", int, "a whole number"),
            prompt=row.text("prompt"),
            metadata=dict(row.require("metadata", dict, "an object")),
            completions=tuple(_completion(fields) for fields in completions),
            sampling=Sampling(**row.require("sampling", dict, "an object")),
            version=WeightVersion(**row.require("version", dict, "an object")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise row.error(f"is not a row of samples as `rlhf sample` writes it: {error}") from error


def _completion(fields: dict[str, Any]) -> SampledCompletion:
    completion = SampledCompletion(
        text=fields["text"],
        token_ids=tuple(map(int, fields["token_ids"])),
        logprobs=tuple(map(float, fields["logprobs"])),
        finish_reason=FinishReason[fields["finish_reason"].upper()],
        seed=int(fields["seed"]),
    )
    if not isinstance(completion.text, str) or len(completion.token_ids) != len(completion.logprobs):
        raise ValueError("a completion needs a string text and one log-prob per token")
    return completion
