"""OpenAI's summarize-from-feedback: comparisons both ways, axis evaluations in.

A comparison is `info`, two `summaries`, `choice`, `worker`, `batch`, `split` and `extra`; what it has no field for is
kept in `extra.native`. An axis evaluation rates one summary; a worker's evaluations of one post are a ranking by the
axis "overall". Source: https://github.com/openai/summarize-from-feedback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.data.rows import Refuse, Row
from rlhf.errors import DataError
from rlhf.feedback.formats.form import (
    NATIVE,
    Options,
    as_json,
    imported,
    noted,
    ordered,
    pair_of,
    provenance,
    ranks_by,
    restored,
)
from rlhf.feedback.judgments import Judgment


def read(row: Row, options: Options) -> Iterator[Judgment]:
    summaries = row.require("summaries", list, "a list of two summaries")
    texts = [summary["text"] for summary in summaries]
    choice = row.require("choice", int, "0 or 1")
    if len(texts) != 2 or choice not in (0, 1):
        raise row.error(f'"choice" must be 0 or 1, of two summaries; it is {choice} of {len(texts)}')
    ranks = (1, 2) if choice == 0 else (2, 1)
    prompt, extra = prompt_of(row), row.fields.get("extra") or {}
    if NATIVE in extra:
        worker = row.text("worker")
        yield restored(row, extra[NATIVE], prompt, texts, ranks=list(ranks), annotator=worker)
        return
    metadata = _noted(row) | noted({"policies": [each.get("policy") for each in summaries]}, "policies")
    metadata |= noted({"notes": [each.get("note") for each in summaries]}, "notes") | noted(extra, "confidence")
    yield imported(row, options, texts, ranks, prompt=prompt, metadata=metadata, annotator=row.text("worker"))


def write(judgments: Sequence[Judgment], options: Options) -> Iterator[dict[str, Any]]:
    """Pairs of longer rankings are rows of their own. Ties have no form here and are left out."""
    for judgment in judgments:
        for pair in ordered(judgment.ranks):
            yield _row(pair_of(judgment, *pair))


def _row(judgment: Judgment) -> dict[str, Any]:
    summaries = [{"text": each.text, "policy": each.policy_version, "note": None} for each in judgment.completions]
    return {
        "info": {"id": judgment.prompt_id, "post": judgment.prompt, "title": None, "subreddit": None},
        "summaries": summaries,
        "choice": 0 if judgment.ranks[0] < judgment.ranks[1] else 1,
        "worker": judgment.annotator,
        "batch": None,
        "split": None,
        "extra": {"confidence": None, NATIVE: provenance(judgment, "annotator")},
    }


def read_axis(row: Row, options: Options) -> Iterator[Judgment]:
    """Of what `gather_axis` put together; one evaluation alone compares nothing."""
    summaries = row.fields["summaries"]
    if len(summaries) < 2:
        return
    scores = [summary["axes"]["overall"] for summary in summaries]
    metadata = _noted(row) | {"axes": as_json([summary["axes"] for summary in summaries])}
    metadata |= {"policies": as_json([summary.get("policy") for summary in summaries])}
    texts = [summary["text"] for summary in summaries]
    judgment = imported(row, options, texts, ranks_by(scores), prompt=prompt_of(row), metadata=metadata)
    yield replace(judgment, annotator=row.text("worker"))


def gather_axis(rows: Iterator[Row], refuse: Refuse) -> Iterator[Row]:
    """A worker's evaluations of one post as one row with `summaries`, in the place of the first."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        try:
            key, summary = (prompt_of(row), row.text("worker")), row.require("summary", dict, "an object")
            if not isinstance(summary.get("text"), str) or not isinstance(_overall(summary), int | float):
                raise row.error('"summary" must have a "text" and a number in axes.overall')
        except DataError as error:
            refuse(error)
            continue
        if key not in found:
            found[key] = Row({**row.fields, "summaries": []}, row.path, row.line)
        found[key].fields["summaries"].append(summary)
    yield from found.values()


def prompt_of(row: Row) -> str:
    """The post as the paper's policies read it, or alone where it has neither title nor subreddit (or is an article).

    Raises:
        DataError: there is none.
    """
    info = row.require("info", dict, "an object")
    title, subreddit, post = info.get("title"), info.get("subreddit"), info.get("post") or info.get("article")
    if not isinstance(post, str) or not post.strip():
        raise row.error('"info" must have a "post" or an "article"')
    if not subreddit:
        return post
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title or ''}\n\nPOST: {post}\n\nTL;DR:"


def _overall(summary: Mapping[str, Any]) -> Any:
    axes = summary.get("axes")
    return axes.get("overall") if isinstance(axes, dict) else None


def _noted(row: Row) -> dict[str, str]:
    return noted(row.fields["info"], "id", "title", "subreddit") | noted(row.fields, "batch", "split")
