"""Argilla's records with a ranking question, both ways. Suggestions are no judgments.

A ranking's value is `[{"value": field's name, "rank": 1}, …]`, equal ranks are ties. Responses are read as Argilla 2
(`{question: [{value, user_id, status}]}`) and Argilla 1 (`[{values: {question: {value}}, user_id, status}]`) have them,
and written as Argilla 2. What a response has no field for is kept in `metadata.native`, as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.form import NATIVE, Options, as_json, imported, noted, provenance, restored
from rlhf.feedback.judgments import UNKNOWN_ANNOTATOR, Judgment

PROMPTS = ("prompt", "instruction", "input", "question", "text")
QUESTION = "ranking"


def read(row: Row, options: Options) -> Iterator[Judgment]:
    fields = row.require("fields", dict, "an object")
    prompt = next((fields[name] for name in PROMPTS if name in fields), None)
    if not isinstance(prompt, str):
        raise row.error(f'"fields" must have one of {", ".join(PROMPTS)}')
    metadata = row.fields.get("metadata") or {}
    kept: list[dict[str, Any]] = json.loads(metadata.get(NATIVE, "[]"))
    beside = noted({name: value for name, value in metadata.items() if name != NATIVE}, *metadata)
    for number, (user, value) in enumerate(_rankings(row)):
        names = [each["value"] for each in value]
        names.sort(key=list(fields).index)
        ranks = [next(each["rank"] for each in value if each["value"] == name) for name in names]
        texts = [fields[name] for name in names]
        native = next((each for each in kept if each["annotator"] == user), None)
        if native is not None:
            kept.remove(native)
            yield restored(row, native, prompt, texts, ranks=ranks)
        else:
            yield imported(row, options, texts, ranks, number=number, prompt=prompt, metadata=beside, annotator=user)


def write(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    records: dict[tuple[str, str, tuple[str, ...]], list[Judgment]] = {}
    for judgment in judgments:
        records.setdefault((judgment.task_id, judgment.prompt, judgment.texts), []).append(judgment)
    for (task_id, prompt, texts), those in records.items():
        names = [f"completion_{number}" for number in range(1, len(texts) + 1)]
        yield {
            "id": task_id,
            "fields": {"prompt": prompt, **dict(zip(names, texts, strict=True))},
            "suggestions": {},
            "responses": {QUESTION: [_response(judgment, names) for judgment in those]},
            "metadata": {NATIVE: as_json([provenance(judgment) for judgment in those])},
        }


def _response(judgment: Judgment, names: Sequence[str]) -> dict[str, Any]:
    value = [{"value": name, "rank": rank} for name, rank in zip(names, judgment.ranks, strict=True)]
    return {"value": value, "user_id": judgment.annotator, "status": "submitted"}


def _rankings(row: Row) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Who gave it and the value, of every submitted ranking."""
    responses = row.require("responses", (dict, list), "an object or a list")
    for response in _version_2(responses) if isinstance(responses, dict) else _version_1(responses):
        value = response["value"]
        if response.get("status", "submitted") == "submitted" and _is_ranking(value):
            yield str(response.get("user_id") or UNKNOWN_ANNOTATOR), value


def _version_2(responses: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for answers in responses.values():
        yield from answers


def _version_1(responses: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for response in responses:
        for answer in (response.get("values") or {}).values():
            yield {**response, "value": answer["value"]}


def _is_ranking(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "rank" in v for v in value)
