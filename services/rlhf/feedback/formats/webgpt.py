"""WebGPT's comparisons: two answers with scores in [-1, 1] that sum to 0; 0 is taken for a tie. Only read.

The strength is the score's distance from 0 in thirds. Source:
https://huggingface.co/datasets/openai/webgpt_comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.data.rows import Row
from rlhf.feedback.formats.form import Options, imported, noted, ranks_by
from rlhf.feedback.judgments import Judgment


def read(row: Row, options: Options) -> Iterator[Judgment]:
    question = row.require("question", (dict, str), "an object or a text")
    prompt = question["full_text"] if isinstance(question, dict) else question
    scores = [float(row.fields[f"score_{n}"]) for n in (0, 1)]
    if abs(sum(scores)) > 1e-6 or max(scores) > 1:
        raise row.error(f"the scores must lie in [-1, 1] and sum to 0, not {scores}")
    texts = [row.text(f"answer_{n}") for n in (0, 1)]
    asked = noted(question, "dataset", "id") if isinstance(question, dict) else {}
    metadata = asked | noted(row.fields, "quotes_0", "quotes_1", "score_0", "score_1")
    strength = min(3, round(3 * max(scores)))
    yield imported(row, options, texts, ranks_by(scores), prompt=prompt, metadata=metadata, strength=strength)
