"""To another form and back: nothing is lost that the form can hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.feedback.exchange import export_judgments, import_judgments
from rlhf.feedback.formats.conversations import noted_chat
from rlhf.feedback.formats.form import dense, ordered
from rlhf.feedback.judgments import SOURCES, CompletionShown, Judgment, problem_of

FEW = settings(max_examples=25, deadline=None)
# No half surrogate pairs, which no file can hold, and none of HH's own marks, which part a dialogue.
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and "Assistant:" not in text
)
SAMPLING = st.dictionaries(st.sampled_from(["temperature", "top_k", "seed"]), st.integers(0, 99) | st.floats(0, 2))


@st.composite
def judgments(draw: st.DrawFn, most: int = 5, ties: bool = True) -> Judgment:
    count = draw(st.integers(2, most))
    texts = draw(st.lists(TEXT, min_size=count, max_size=count, unique=True))
    ranks = draw(
        st.lists(st.integers(1, count), min_size=count, max_size=count)
        if ties
        else st.permutations(range(1, count + 1))
    )
    return Judgment(
        judgment_id=draw(TEXT),
        task_id=draw(TEXT),
        prompt=draw(TEXT),
        prompt_id=draw(st.just("") | TEXT),
        metadata=draw(st.dictionaries(st.sampled_from(["topic", "answer"]), st.text(st.characters(codec="utf-8")))),
        completions=tuple(
            CompletionShown(text, draw(st.just("") | TEXT), draw(st.just("") | TEXT), draw(SAMPLING)) for text in texts
        ),
        ranks=dense(ranks),
        order_shown=draw(st.just(()) | st.permutations(range(count)).map(tuple)),
        annotator=draw(TEXT.filter(lambda name: name == name.strip())),
        # An import drops the duplicates among what another import gave.
        source=draw(st.sampled_from([source for source in SOURCES if source != "imported"])),
        p_select=draw(st.none() | st.floats(0.01, 1)),
        strength=draw(st.none() | st.integers(0, 3)) if count == 2 else None,
        flags=tuple(draw(st.lists(TEXT, max_size=2))),
        reason=draw(st.just("") | TEXT),
        ms_visible=draw(st.none() | st.integers(0, 10**9)),
        guideline_version=draw(st.sampled_from(["", "2"])),
        revision=draw(st.integers(0, 3)),
        created_at=draw(st.sampled_from(["", "2026-11-20T10:11:12.123456+00:00"])),
    )


def there_and_back(format_name: str, those: Sequence[Judgment], ending: str = "jsonl") -> list[Judgment]:
    """Through a file, or a folder of Hugging Face's where there is no ending."""
    assert not any(map(problem_of, those))
    with TemporaryDirectory() as folder:
        path = Path(folder, f"data.{ending}".rstrip("."))
        export_judgments(path, those, format_name)
        return list(import_judgments(path, format_name).judgments)


def test_a_folder_of_hugging_faces_holds_rows_too() -> None:
    plain = Judgment(
        judgment_id="1",
        task_id="1",
        prompt="p",
        metadata={"topic": "x"},
        completions=(CompletionShown("a", sampling={"top_k": 5}), CompletionShown("b")),
        ranks=(2, 1),
        annotator="x",
        source="random",
    )
    assert there_and_back("native", [plain], "") == [plain]
    [found] = there_and_back("trl-conversational", [plain], "")
    assert (found.texts, found.policy_version) == (("b", "a"), "unknown:data")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
@given(one=judgments(), other=judgments())
@FEW
def test_native_keeps_everything(ending: str, one: Judgment, other: Judgment) -> None:
    assert there_and_back("native", [one, other], ending) == [one, other]


@pytest.mark.parametrize(
    ("format_name", "ending"), [("label-studio", "json"), ("argilla", "json"), ("argilla", "jsonl")]
)
@given(one=judgments(), other=judgments())
@FEW
def test_whole_rankings_come_back_with_all_their_provenance(
    format_name: str, ending: str, one: Judgment, other: Judgment
) -> None:
    same_task = replace(other, task_id=one.task_id, prompt=one.prompt, completions=one.completions)
    same_task = replace(same_task, ranks=one.ranks[::-1], order_shown=(), strength=None)
    those = [one, replace(same_task, judgment_id=one.judgment_id + "1"), replace(other, task_id=one.task_id + "2")]
    those[2] = replace(those[2], judgment_id=one.judgment_id + "2")
    assert there_and_back(format_name, those, ending) == those


@given(judgments(most=2, ties=False))
@FEW
def test_openai_comparisons_of_two_keep_everything(judgment: Judgment) -> None:
    assert there_and_back("openai", [judgment]) == [judgment]


@given(judgments())
@FEW
def test_longer_rankings_become_openai_pairs_with_their_provenance(judgment: Judgment) -> None:
    pairs = list(ordered(judgment.ranks))
    if not pairs:
        return
    found = there_and_back("openai", [judgment])
    for (better, worse), pair in zip(pairs, found, strict=True):
        best = pair.completions[pair.ranks.index(1)]
        assert (best, pair.completions[pair.ranks.index(2)]) == (
            judgment.completions[better],
            judgment.completions[worse],
        )
        kept = ("prompt", "prompt_id", "task_id", "annotator", "source", "p_select", "flags", "metadata", "created_at")
        assert [getattr(pair, name) for name in kept] == [getattr(judgment, name) for name in kept]
        shown = [pair.texts[place] for place in pair.order_shown]
        assert shown == [judgment.texts[k] for k in judgment.order_shown if judgment.texts[k] in pair.texts]


def preferences(judgment: Judgment) -> set[tuple[str, str]]:
    return {(judgment.texts[better], judgment.texts[worse]) for better, worse in ordered(judgment.ranks)}


@pytest.mark.parametrize("format_name", ["trl", "openrlhf", "trl-conversational"])
@given(judgments(), st.booleans())
@FEW
def test_pairs_keep_prompt_completions_order_and_strength(format_name: str, judgment: Judgment, chat: bool) -> None:
    if not preferences(judgment):
        return
    if chat:
        messages = [{"role": "system", "content": judgment.prompt}, {"role": "user", "content": "x"}]
        judgment = replace(judgment, metadata=noted_chat(messages, [[{"role": "assistant", "content": ""}]]))
    found = there_and_back(format_name, [judgment])
    assert set().union(*map(preferences, found)) == preferences(judgment)
    assert {each.strength for each in found} == {judgment.strength}
    assert all(each.policy_version == "unknown:data" for each in found)
    if format_name != "trl-conversational":
        assert {each.prompt for each in found} == {judgment.prompt}
    elif chat:
        assert {each.metadata["messages"] for each in found} == {judgment.metadata["messages"]}
    else:
        assert {each.prompt for each in found} == {f"user: {judgment.prompt}"}


@given(judgments())
@FEW
def test_implicit_pairs_keep_the_whole_texts(judgment: Judgment) -> None:
    if not preferences(judgment):
        return
    found = there_and_back("trl-implicit", [judgment])
    wholes = {(judgment.prompt + better, judgment.prompt + worse) for better, worse in preferences(judgment)}
    assert {(each.prompt + each.texts[0], each.prompt + each.texts[1]) for each in found} == wholes


@given(judgments())
@FEW
def test_hh_keeps_a_dialogue(judgment: Judgment) -> None:
    judgment = replace(judgment, prompt=f"\n\nHuman: {judgment.prompt}\n\nAssistant:")
    if preferences(judgment):
        found = there_and_back("hh", [judgment], "jsonl.gz")
        assert {each.prompt for each in found} == {judgment.prompt}
        assert set().union(*map(preferences, found)) == preferences(judgment)


def test_hh_marks_a_prompt_that_has_no_marks() -> None:
    plain = Judgment(
        judgment_id="1",
        task_id="1",
        prompt="Hi",
        completions=(CompletionShown(" a"), CompletionShown(" b")),
        ranks=(2, 1),
        annotator="x",
        source="random",
    )
    [found] = there_and_back("hh", [plain], "jsonl.gz")
    assert (found.prompt, found.texts) == ("\n\nHuman: Hi\n\nAssistant:", (" b", " a"))


@given(judgments())
@FEW
def test_unpaired_rows_are_the_best_and_the_worst(judgment: Judgment) -> None:
    if not preferences(judgment):
        return
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        export_judgments(path, [judgment], "trl-unpaired")
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
    ranks = dict(zip(judgment.texts, judgment.ranks, strict=True))
    assert {row["completion"]: row["label"] for row in rows} == {
        text: rank == 1 for text, rank in ranks.items() if rank in (1, max(judgment.ranks))
    }


@given(judgments())
@FEW
def test_a_changed_ranking_of_another_tool_holds_over_what_was_kept(judgment: Judgment) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        export_judgments(path, [judgment], "argilla")
        row = json.loads(path.read_bytes())
        for number, value in enumerate(row["responses"]["ranking"][0]["value"], start=1):
            value["rank"] = number
        path.write_text(json.dumps(row) + "\n")
        [found] = import_judgments(path, "argilla").judgments
    changed = asdict(found) | {"ranks": None}
    assert found.ranks == tuple(range(1, len(judgment.ranks) + 1))
    assert changed == asdict(judgment) | {"ranks": None}
