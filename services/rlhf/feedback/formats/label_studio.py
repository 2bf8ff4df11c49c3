"""Label Studio's tasks with a Ranker, both ways: `data{prompt, items[{id, title, body}]}` and their `annotations`.

A ranker's value is either one list of ids, best first, or buckets of ids, in which those of one bucket tie. What is
written has one bucket for every rank, named 1, 2, …. Cancelled annotations are no judgments. What an annotation has no
field for is kept in its result's `meta.native`. Source: https://labelstud.io/tags/ranker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.rows import Row
from rlhf.feedback.formats.form import NATIVE, Options, dense, imported, noted, provenance, restored
from rlhf.feedback.judgments import Judgment

UNRANKED = "_"


def read(row: Row, options: Options) -> Iterator[Judgment]:
    data = row.require("data", dict, "an object")
    prompt, items = data["prompt"], data["items"]
    texts = [item["body"] for item in items]
    annotations = row.require("annotations", list, "a list")
    if not any(isinstance(each, dict) for each in annotations):
        raise row.error('"annotations" has none')
    for number, annotation in enumerate(annotations):
        if annotation.get("was_cancelled"):
            continue
        result = _result(row, annotation)
        ranks = _ranks(row, result["value"]["ranker"], [str(item["id"]) for item in items])
        held = {"annotator": _who(annotation), **_timing(annotation)}
        native = (result.get("meta") or {}).get(NATIVE)
        if native is not None:
            yield restored(row, native, prompt, texts, ranks=list(ranks), **held)
            continue
        flags = ("ground_truth",) if annotation.get("ground_truth") else ()
        metadata = noted({name: value for name, value in data.items() if name not in ("prompt", "items")}, *data)
        yield imported(row, options, texts, ranks, number=number, prompt=prompt, metadata=metadata, flags=flags, **held)


def write(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    tasks: dict[tuple[str, str, tuple[str, ...]], list[Judgment]] = {}
    for judgment in judgments:
        tasks.setdefault((judgment.task_id, judgment.prompt, judgment.texts), []).append(judgment)
    for (_, prompt, texts), those in tasks.items():
        items = [{"id": str(n), "title": f"Reply {n + 1}", "body": text} for n, text in enumerate(texts)]
        yield {
            "data": {"prompt": prompt, "items": items},
            "annotations": list(map(_annotation, those)),
        }


def _annotation(judgment: Judgment) -> dict[str, Any]:
    buckets: dict[str, list[str]] = {}
    ranks = dense(judgment.ranks)
    for index in sorted(range(len(ranks)), key=lambda n: ranks[n]):
        buckets.setdefault(str(ranks[index]), []).append(str(index))
    value, meta = {"ranker": buckets}, {NATIVE: provenance(judgment, "annotator")}
    lead = {} if judgment.ms_visible is None else {"lead_time": judgment.ms_visible / 1000}
    created = {"created_at": judgment.created_at} if judgment.created_at else {}
    return {
        "completed_by": {"email": judgment.annotator},
        "was_cancelled": False,
        "ground_truth": judgment.source == "gold",
        "result": [{"from_name": "rank", "to_name": "items", "type": "ranker", "value": value, "meta": meta}],
        **lead,
        **created,
    }


def _result(row: Row, annotation: Mapping[str, Any]) -> Mapping[str, Any]:
    results: list[Mapping[str, Any]] = annotation.get("result", [])
    found = next((each for each in results if (each.get("value") or {}).get("ranker")), None)
    if found is None:
        raise row.error("an annotation has no result with a ranker")
    return found


def _ranks(row: Row, ranker: Mapping[str, Sequence[str]], ids: Sequence[str]) -> tuple[int, ...]:
    buckets = {name: list(map(str, members)) for name, members in ranker.items() if name != UNRANKED}
    if all(name.isdigit() for name in buckets):
        levels = [buckets[name] for name in sorted(buckets, key=int)]
    elif len(buckets) == 1:
        levels = [[each] for each in next(iter(buckets.values()))]
    else:
        levels = list(buckets.values())
    levels = [level for level in levels if level]
    if sorted(each for level in levels for each in level) != sorted(ids):
        raise row.error("an annotation ranks other items than the task has, or not all of them")
    return tuple(next(n for n, level in enumerate(levels, start=1) if each in level) for each in ids)


def _who(annotation: Mapping[str, Any]) -> str:
    who = annotation["completed_by"]
    return str(who.get("email") or who["id"]) if isinstance(who, dict) else str(who)


def _timing(annotation: Mapping[str, Any]) -> dict[str, Any]:
    lead, created = annotation.get("lead_time"), annotation.get("created_at") or ""
    return {"ms_visible": None if lead is None else round(lead * 1000), "created_at": created.replace("Z", "+00:00")}
