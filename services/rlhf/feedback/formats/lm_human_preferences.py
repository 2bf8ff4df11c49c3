"""OpenAI's lm-human-preferences: token ids of `query` and `sample0`, `sample1`, … with a label. Only read.

`best` names the best of the samples and says nothing of the others, which are flagged rather than called a tie between
them; `difference` is how much better sample1 is than sample0; `score` rates a single sample, and those of one query
make a ranking. Texts are read as they are, ids with `feedback.tokenizer`.
Source: https://github.com/openai/lm-human-preferences, lm_human_preferences/label_types.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.data.rows import Refuse, Row
from rlhf.errors import SettingsError
from rlhf.feedback.formats.form import Options, as_json, imported, noted, ranks_by
from rlhf.feedback.judgments import Judgment

BEST_ONLY = "best-only"
"""The flag of a judgment whose ranks after the first mean "not the best"."""


def read(row: Row, options: Options) -> Iterator[Judgment]:
    prompt = _text(row.fields["query"], options)
    texts = [_text(sample, options) for sample in _samples(row)]
    if "scores" in row.fields:
        scores = row.fields["scores"]
        if len(scores) > 1:
            yield imported(row, options, texts, ranks_by(scores), prompt=prompt, metadata={"scores": as_json(scores)})
    elif "difference" in row.fields:
        ranks = ranks_by([0.0, float(row.fields["difference"])])
        yield imported(row, options, texts, ranks, prompt=prompt, metadata=noted(row.fields, "difference"))
    else:
        best = row.require("best", int, "the number of a sample")
        if not 0 <= best < len(texts):
            raise row.error(f'"best" must be one of the {len(texts)} samples, not {best}')
        flags = (BEST_ONLY,) if len(texts) > 2 else ()
        ranks = tuple(1 if n == best else 2 for n in range(len(texts)))
        yield imported(row, options, texts, ranks, prompt=prompt, flags=flags)


def gather(rows: Iterator[Row], refuse: Refuse) -> Iterator[Row]:
    """Scored samples of one query as one row with `scores`; every other row as it is."""
    scored: dict[str, Row] = {}
    for row in rows:
        if "score" not in row.fields:
            yield row
            continue
        sample = row.fields.get("sample", row.fields.get("sample0"))
        if sample is None or "query" not in row.fields or not isinstance(row.fields["score"], int | float):
            refuse(row.error('a scored row needs "query", "sample" and a number in "score"'))
            continue
        key = as_json(row.fields["query"])
        if key not in scored:
            scored[key] = Row({"query": row.fields["query"], "scores": []}, row.path, row.line)
        whole = scored[key].fields
        whole[f"sample{len(whole['scores'])}"] = sample
        whole["scores"].append(row.fields["score"])
    yield from scored.values()


def _samples(row: Row) -> list[Any]:
    names = [f"sample{n}" for n in range(len(row.fields))]
    return [row.fields[name] for name in names if name in row.fields]


def _text(value: Any, options: Options) -> str:
    if isinstance(value, str):
        return value
    if options.tokenizer is None:
        raise SettingsError("feedback.tokenizer: the rows hold token ids, which need the folder of their tokenizer")
    tokenizer = _tokenizer(options.tokenizer)
    return str(tokenizer.decode(value, skip_special_tokens=True))


@cache
def _tokenizer(folder: Path) -> Any:
    from rlhf.models.tokenizer import load_tokenizer

    return load_tokenizer(folder)
