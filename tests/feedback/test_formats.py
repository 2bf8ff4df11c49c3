"""A row of every format in the form its source publishes, and what it is read as."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.rows import write_json, write_parquet, write_rows
from rlhf.errors import DataError, SettingsError
from rlhf.feedback.exchange import export_judgments, import_judgments
from rlhf.feedback.formats.form import Options
from rlhf.feedback.formats.table import FORMATS
from rlhf.feedback.judgments import CompletionShown, Judgment
from support.tiny import tiny_tokenizer

Row = dict[str, Any]
USER = {"role": "user", "content": "Hi"}


def said(text: str) -> Row:
    return {"role": "assistant", "content": text}


def summary(text: str, policy: str, **more: Any) -> Row:
    return {"text": text, "policy": policy, "note": "", **more}


POST = {"id": "t3_1", "post": "My cat left.", "title": "Cat", "subreddit": "pets"}
POST_PROMPT = "SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: My cat left.\n\nTL;DR:"
AXIS = {"info": POST, "split": "valid2", "worker": "w1", "batch": "b0"}


def message(ident: str, text: str, role: str = "assistant", **more: Any) -> Row:
    return {"message_id": ident, "text": text, "role": role, "replies": [], **more}


TREE = message(
    "root",
    "Hi",
    "prompter",
    replies=[
        message("a", "Hello", rank=1, replies=[message("b", "More", "prompter", replies=[])]),
        message("c", "Hey", rank=0),
        message("d", "Yo"),
    ],
)

MULTIPREF = {
    "text": "p",
    "completion_a": "a",
    "completion_b": "b",
    "normal_worker_annotations": [{"overall_pref": "Tie"}],
}

# name of the format, row, prompt, completions, ranks, other fields of the judgment
ONE: list[tuple[str, Row, str, tuple[str, ...], tuple[int, ...], Row]] = [
    ("trl", {"prompt": "P", "chosen": "a", "rejected": "b", "margin": 2.0}, "P", ("a", "b"), (1, 2), {"strength": 2}),
    (
        "trl",
        {"prompt": "P", "chosen": "a", "rejected": "b", "margin": 0.4},
        "P",
        ("a", "b"),
        (1, 2),
        {"strength": None},
    ),
    (
        "trl",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "The sky is",
        (" blue.", " green."),
        (1, 2),
        {},
    ),
    (
        "trl",
        {"prompt": [USER], "chosen": [said("a")], "rejected": [said("b")], "tools": [{"name": "t"}]},
        "user: Hi",
        ("a", "b"),
        (1, 2),
        {"metadata": {"messages": json.dumps([USER]), "tools": '[{"name": "t"}]'}},
    ),
    ("trl", {"chosen": [USER, said("a")], "rejected": [USER, said("b")]}, "user: Hi", ("a", "b"), (1, 2), {}),
    (
        "hh",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        "\n\nHuman: Hi\n\nAssistant:",
        (" a", " b"),
        (1, 2),
        {"annotator": "unknown", "order_shown": ()},
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: And?\n\nAssistant: c",
            "rejected": "\n\nHuman: Hi\n\nAssistant: b",
        },
        "\n\nHuman: Hi\n\nAssistant:",
        (" a\n\nHuman: And?\n\nAssistant: c", " b"),
        (1, 2),
        {},
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: And?\n\nAssistant: b",
            "rejected": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: And?\n\nAssistant: c",
        },
        "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: And?\n\nAssistant:",
        (" b", " c"),
        (1, 2),
        {},
    ),
    (
        "openai",
        {
            **AXIS,
            "summaries": [summary("s0", "sup1"), summary("s1", "sup2")],
            "choice": 1,
            "extra": {"confidence": 7},
        },
        POST_PROMPT,
        ("s0", "s1"),
        (2, 1),
        {"annotator": "w1"},
    ),
    (
        "lm-human-preferences",
        {"query": "Q", "sample0": "a", "sample1": "b", "sample2": "c", "best": 1},
        "Q",
        tuple("abc"),
        (2, 1, 2),
        {"flags": ("best-only",)},
    ),
    (
        "lm-human-preferences",
        {"query": "Q", "sample0": "a", "sample1": "b", "difference": 1.5},
        "Q",
        tuple("ab"),
        (2, 1),
        {},
    ),
    (
        "webgpt",
        {
            "question": {"dataset": "eli5", "id": "7", "full_text": "Why?"},
            "quotes_0": {"title": ["t"], "extract": ["e"]},
            "answer_0": "a",
            "score_0": -0.6667,
            "tokens_0": {"prefix": [], "completion": []},
            "quotes_1": {"title": [], "extract": []},
            "answer_1": "b",
            "score_1": 0.6667,
            "tokens_1": {"prefix": [], "completion": []},
        },
        "Why?",
        ("a", "b"),
        (2, 1),
        {"strength": 2},
    ),
    (
        "webgpt",
        {"question": "Why?", "answer_0": "a", "score_0": 0.0, "answer_1": "b", "score_1": 0.0},
        "Why?",
        ("a", "b"),
        (1, 1),
        {"strength": 0},
    ),
    (
        "arena-55k",
        {
            "id": 30192,
            "model_a": "gpt-4",
            "model_b": "koala",
            "prompt": '["Hi", "And?"]',
            "response_a": '["a1", "a2"]',
            "response_b": '["b1", null]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        "Hi",
        ("assistant: a1\nuser: And?\nassistant: a2", "assistant: b1\nuser: And?\nassistant: "),
        (2, 1),
        {"order_shown": (0, 1), "metadata": {"id": "30192", "policies": '["gpt-4", "koala"]'}},
    ),
    (
        "fastchat",
        {
            "question_id": "q",
            "model_a": "x",
            "model_b": "y",
            "winner": "tie (bothbad)",
            "judge": "arena_user_9",
            "conversation_a": [USER, said("a")],
            "conversation_b": [USER, said("b")],
            "turn": 1,
            "anony": True,
            "language": "English",
            "tstamp": 1682351591.5,
        },
        "Hi",
        ("a", "b"),
        (1, 1),
        {"flags": ("all-bad",), "annotator": "arena_user_9", "created_at": "2023-04-24T15:53:11.500000+00:00"},
    ),
    ("oasst", {"message_tree_id": "root", "tree_state": "ready", "prompt": TREE}, "Hi", ("Hello", "Hey"), (2, 1), {}),
    (
        "ultrafeedback",
        {
            "source": "evol",
            "instruction": "Do",
            "models": ["m1", "m2", "m3"],
            "completions": [
                {"model": "m1", "response": "a", "overall_score": 7},
                {"model": "m2", "response": "b", "overall_score": 8.5},
                {"model": "m3", "response": "c", "overall_score": 7},
            ],
        },
        "Do",
        ("a", "b", "c"),
        (2, 1, 2),
        {},
    ),
    (
        "ultrafeedback-binarized",
        {
            "prompt": "Do",
            "prompt_id": "f00",
            "chosen": [{"role": "user", "content": "Do"}, said("a")],
            "rejected": [{"role": "user", "content": "Do"}, said("b")],
            "messages": [{"role": "user", "content": "Do"}, said("a")],
            "score_chosen": 8.0,
            "score_rejected": 5.5,
        },
        "Do",
        ("a", "b"),
        (1, 2),
        {"metadata": {"prompt_id": "f00", "scores": "[8.0, 5.5]"}},
    ),
    (
        "ultrafeedback-argilla",
        {
            "source": "evol",
            "instruction": "Do",
            "chosen_response": "a",
            "rejected_response": "b",
            "chosen_avg_rating": 4.5,
            "rejected_avg_rating": 4.5,
            "chosen_model": "m1",
        },
        "Do",
        ("a", "b"),
        (1, 1),
        {},
    ),
    (
        "helpsteer2",
        {
            "split": "train",
            "prompt": "Do",
            "response_1": "a",
            "response_2": "b",
            "preference_strength": -2,
            "preference_statement": "@Response 1 is better",
        },
        "Do",
        ("a", "b"),
        (1, 2),
        {"strength": 2, "reason": "@Response 1 is better"},
    ),
    (
        "argilla",
        {
            "fields": {"instruction": "Do", "r1": "a", "r2": "b"},
            "suggestions": {"ranking": {"value": [{"value": "r1", "rank": 1}, {"value": "r2", "rank": 2}]}},
            "responses": [
                {
                    "user_id": "u1",
                    "status": "submitted",
                    "values": {
                        "ranking": {"value": [{"value": "r2", "rank": 1}, {"value": "r1", "rank": 1}]},
                        "why": {"value": "good"},
                    },
                },
                {"user_id": "u2", "status": "discarded", "values": None},
            ],
            "metadata": {"origin": "x"},
        },
        "Do",
        ("a", "b"),
        (1, 1),
        {"annotator": "u1", "metadata": {"origin": "x"}},
    ),
    ("multipref", MULTIPREF, "p", ("a", "b"), (1, 1), {"strength": 0, "annotator": "unknown"}),
    (
        "label-studio",
        {
            "id": 3,
            "data": {
                "prompt": "Do",
                "items": [{"id": "blog", "title": "1", "body": "a"}, {"id": "wiki", "title": "2", "body": "b"}],
            },
            "annotations": [
                {
                    "id": 1,
                    "completed_by": 7,
                    "lead_time": 12.5,
                    "was_cancelled": False,
                    "ground_truth": True,
                    "created_at": "2026-01-02T03:04:05.000000Z",
                    "result": [
                        {
                            "from_name": "rank",
                            "to_name": "l",
                            "type": "ranker",
                            "value": {"ranker": {"rank": ["wiki", "blog"]}},
                        }
                    ],
                },
                {"id": 2, "completed_by": 8, "was_cancelled": True, "result": []},
            ],
        },
        "Do",
        ("a", "b"),
        (2, 1),
        {
            "annotator": "7",
            "ms_visible": 12500,
            "flags": ("ground_truth",),
            "created_at": "2026-01-02T03:04:05.000000+00:00",
        },
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "texts", "ranks", "others"), ONE)
def test_a_published_row(
    tmp_path: Path, name: str, row: Row, prompt: str, texts: tuple[str, ...], ranks: tuple[int, ...], others: Row
) -> None:
    write_rows(tmp_path / "data.jsonl.gz", [row])
    [judgment] = import_judgments(tmp_path / "data.jsonl.gz", name).judgments
    assert (judgment.prompt, judgment.texts, judgment.ranks) == (prompt, texts, ranks)
    assert {field: getattr(judgment, field) for field in others} == others
    assert (judgment.policy_version, judgment.source) == ("unknown:data", "imported")
    assert {"judgment_id": judgment.judgment_id, "p_select": judgment.p_select} == {
        "judgment_id": "data:1/0",
        "p_select": None,
    }


def several(tmp_path: Path, name: str, rows: list[Row]) -> list[Judgment]:
    write_json(tmp_path / "data.json", rows)
    return list(import_judgments(tmp_path / "data.json", name).judgments)


def test_each_annotator_of_helpsteer_gives_a_judgment(tmp_path: Path) -> None:
    individual = [{"score": s, "reasoning": f"r{s}", "feedback1": "", "feedback2": ""} for s in (-1, 3, 0)]
    row = {"domain": "code", "language": "python", "context": [USER], "response1": "a", "response2": "b"}
    found = several(tmp_path, "helpsteer3", [row | {"overall_preference": 1, "individual_preference": individual}])
    assert [(j.ranks, j.strength, j.reason) for j in found] == [
        ((1, 2), 1, "r-1"),
        ((2, 1), 3, "r3"),
        ((1, 1), 0, "r0"),
    ]
    assert len({j.judgment_id for j in found}) == 3
    unprocessed = [{"strength": -100, "justification": "neither"}, {"strength": 1, "justification": "b"}]
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "all_preferences_unprocessed": unprocessed}
    assert [j.ranks for j in several(tmp_path, "helpsteer2", [row | {"preference_strength": 1}])] == [(2, 1)]


def test_equal_answers_of_people_without_a_name_are_no_duplicates_within_a_row(tmp_path: Path) -> None:
    individual = [{"score": 1, "reasoning": ""}] * 3
    row = {"context": [USER], "response1": "a", "response2": "b", "individual_preference": individual}
    assert len(several(tmp_path, "helpsteer3", [row, row])) == 3


def test_workers_and_experts_of_multipref(tmp_path: Path) -> None:
    def annotation(who: str, preference: str) -> Row:
        stamp = "2024-05-01T10:00:00"
        return {
            "evaluator": who,
            "overall_pref": preference,
            "overall_confidence": "very",
            "time_spent": 61,
            "timestamp": stamp,
        }

    row = {
        "comparison_id": "c1",
        "text": "Do",
        "completion_a": "a",
        "completion_b": "b",
        "model_a": "x",
        "model_b": "y",
        "normal_worker_annotations": [annotation("w1", "A-is-clearly-better"), annotation("w2", "Tie")],
        "expert_worker_annotations": [annotation("e1", "B-is-slightly-better")],
    }
    found = several(tmp_path, "multipref", [row])
    assert [(j.annotator, j.ranks, j.strength) for j in found] == [
        ("w1", (1, 2), 2),
        ("w2", (1, 1), 0),
        ("e1", (2, 1), 1),
    ]
    assert [j.metadata["workers"] for j in found] == ["normal", "normal", "expert"]
    assert (found[0].ms_visible, found[0].created_at) == (61000, "2024-05-01T10:00:00+00:00")


def test_a_workers_axis_evaluations_of_a_post_are_a_ranking(tmp_path: Path) -> None:
    def evaluation(text: str, overall: int, worker: str = "w1") -> Row:
        return {**AXIS, "worker": worker, "summary": summary(text, "p", axes={"overall": overall, "accuracy": 7})}

    rows = [evaluation("s", 5), evaluation("t", 7), evaluation("s", 1, "w2"), evaluation("u", 5)]
    [judgment] = several(tmp_path, "openai-axis", rows)
    assert (judgment.prompt, judgment.texts, judgment.ranks) == (POST_PROMPT, ("s", "t", "u"), (2, 1, 2))
    assert judgment.annotator == "w1"


def test_scores_of_a_query_are_a_ranking(tmp_path: Path) -> None:
    rows = [{"query": "Q", "sample": text, "score": score} for text, score in (("a", 1), ("b", 3), ("c", 2))]
    [judgment] = several(tmp_path, "lm-human-preferences", [*rows, {"query": "R", "sample": "x", "score": 0}])
    assert (judgment.texts, judgment.ranks) == (("a", "b", "c"), (3, 1, 2))


def test_token_ids_need_their_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = {"query": "Film 0:", "sample0": " good", "sample1": " dull"}
    write_json(tmp_path / "data.json", [{**{k: tokenizer(v).input_ids for k, v in texts.items()}, "best": 0}])
    with pytest.raises(SettingsError, match=r"feedback\.tokenizer"):
        import_judgments(tmp_path / "data.json", "lm-human-preferences")
    options = Options(tokenizer=tmp_path / "tokenizer")
    [judgment] = import_judgments(tmp_path / "data.json", "lm-human-preferences", options).judgments
    assert (judgment.prompt, judgment.texts, judgment.ranks) == ("Film 0:", (" good", " dull"), (1, 2))
    export_judgments(tmp_path / "ids.jsonl", [judgment], "tokenised", options)
    ids = json.loads((tmp_path / "ids.jsonl").read_text())
    assert ids["chosen_ids"] == [*tokenizer("Film 0:").input_ids, *tokenizer(" good").input_ids, tokenizer.eos_token_id]


def test_rankings_of_people_come_before_the_consensus(tmp_path: Path) -> None:
    events = {"ranking": [{"type": "ranking", "ranked_message_ids": ["c", "gone", "a", "d"], "not_rankable": False}]}
    events["ranking"].append({"type": "ranking", "ranked_message_ids": ["a", "c"], "not_rankable": True})
    [judgment] = several(tmp_path, "oasst", [{"prompt": TREE | {"events": events}}])
    assert (judgment.texts, judgment.ranks) == (("Hey", "Hello", "Yo"), (1, 2, 3))


def test_flat_messages_are_put_together_to_trees(tmp_path: Path) -> None:
    def flat(ident: str, parent: str | None, text: str, role: str, rank: int | None = None) -> Row:
        return {"message_id": ident, "parent_id": parent, "text": text, "role": role, "rank": rank}

    rows = [
        flat("1", None, "Hi", "prompter"),
        flat("2", "1", "Hello", "assistant", 0),
        flat("3", "2", "Tell", "prompter"),
        flat("4", "3", "x", "assistant", 1),
        flat("5", "3", "y", "assistant", 0),
    ]
    [judgment] = several(tmp_path, "oasst", rows)
    assert judgment.prompt == "user: Hi\nassistant: Hello\nuser: Tell"
    assert (judgment.texts, judgment.ranks) == (("x", "y"), (2, 1))


def test_buckets_of_label_studio_are_ties(tmp_path: Path) -> None:
    items = [{"id": name, "title": name, "body": name} for name in "abc"]

    def task(ranker: Row) -> Row:
        result = [{"type": "ranker", "value": {"ranker": ranker}}]
        return {
            "data": {"prompt": "p", "items": items},
            "annotations": [{"completed_by": {"email": "x@y"}, "result": result}],
        }

    found = several(
        tmp_path,
        "label-studio",
        [task({"_": ["a"], "best": ["b", "c"], "worst": ["a"]}), task({"2": ["a"], "1": ["b"], "10": ["c"]})],
    )
    assert [j.ranks for j in found] == [(2, 1, 1), (2, 1, 3)]
    assert found[0].annotator == "x@y"
    with pytest.raises(DataError, match=r"data\.json:1: an annotation ranks other items"):
        several(tmp_path, "label-studio", [task({"best": ["b", "c"]})])


BAD: list[tuple[str, Row, str]] = [
    ("trl", {"chosen": "Same", "rejected": "Same"}, "begin with one prompt"),
    ("trl", {"chosen": [USER], "rejected": [USER]}, "begin with the same messages"),
    ("trl", {"prompt": "p", "chosen": "a"}, '"rejected" is missing'),
    ("hh", {"chosen": "a", "rejected": "b"}, "share a dialogue"),
    ("openai", {**AXIS, "summaries": [summary("s", "p")] * 2, "choice": 2}, '"choice" must be 0 or 1'),
    ("openai", {**AXIS, "info": {}, "summaries": [summary("s", "p")] * 2, "choice": 1}, '"post" or an "article"'),
    ("webgpt", {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 1}, "sum to 0"),
    ("fastchat", {"winner": "nobody"}, '"winner" must be one of'),
    ("arena-55k", {"prompt": "Hi"}, "is no row in the form arena-55k"),
    ("ultrafeedback", {"instruction": "x", "completions": [{"model": "m"}]}, "there is no 'overall_score'"),
    ("ultrafeedback", {"instruction": "x", "completions": []}, "at least two completions"),
    ("helpsteer2", {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 9}, "from -3 to 3"),
    ("multipref", {**MULTIPREF, "normal_worker_annotations": [{"overall_pref": "A"}]}, '"overall_pref" must be'),
    ("argilla", {"fields": {"x": "y"}, "responses": {}}, '"fields" must have one of'),
    ("label-studio", {"data": {"prompt": "p", "items": []}, "annotations": []}, '"annotations" has none'),
    ("lm-human-preferences", {"query": "q", "sample0": "a", "sample1": "b", "best": 2}, '"best" must be one of'),
    ("trl", {"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, "half a surrogate pair"),
    ("trl", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "\ud800"}, "cannot be kept as UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "said"), BAD)
def test_a_bad_row_is_named_and_stops_or_is_left_out(tmp_path: Path, name: str, row: Row, said: str) -> None:
    good = next(row for known, row, *_ in ONE if known == name)
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\nno json\n")
    with pytest.raises(DataError) as caught:
        import_judgments(path, name)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert said in str(caught.value)
    found = import_judgments(path, name, on_bad="skip")
    assert len(found.judgments) == 1
    assert [str(error).split(": ")[0] for error in found.bad] == [f"{path}:2", f"{path}:3"]


def test_every_format_that_is_read_has_its_row() -> None:
    told = {name for name, *_ in ONE} | {"helpsteer3", "openai-axis", "native", "openrlhf"}
    assert {name for name, each in FORMATS.items() if each.read} == told | {"trl-implicit", "trl-conversational"}


def test_duplicates_are_dropped_and_the_dataset_has_its_name(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    write_rows(
        tmp_path / "x.jsonl", [pair, pair, pair | {"chosen": "c"}, {"prompt": "p", "chosen": "b", "rejected": "a"}]
    )
    found = import_judgments(tmp_path / "x.jsonl", "trl", Options(dataset="mine"))
    assert (len(found.judgments), found.duplicates) == (3, 1)
    assert {j.policy_version for j in found.judgments} == {"unknown:mine"}
    assert [j.judgment_id for j in found.judgments] == ["mine/x.jsonl:1/0", "mine/x.jsonl:3/0", "mine/x.jsonl:4/0"]


def test_openrlhf_has_its_own_names_of_keys(tmp_path: Path) -> None:
    options = Options(prompt_key="q", chosen_key="yes", rejected_key="no")
    write_rows(tmp_path / "x.jsonl", [{"q": "p", "yes": "a", "no": "b", "margin": 1}])
    found = import_judgments(tmp_path / "x.jsonl", "openrlhf", options).judgments
    assert (found[0].texts, found[0].strength) == (("a", "b"), 1)
    export_judgments(tmp_path / "y.jsonl", found, "openrlhf", options)
    assert json.loads((tmp_path / "y.jsonl").read_text()) == {"q": "p", "yes": "a", "no": "b", "margin": 1.0}


def test_a_format_that_does_not_go_this_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'webgpt' cannot be written; there are native, trl"):
        export_judgments(tmp_path / "x.jsonl", [], "webgpt")
    with pytest.raises(SettingsError, match="'tokenised' cannot be read"):
        import_judgments(tmp_path / "x.jsonl", "tokenised")


def test_parquet_and_saved_datasets_are_read(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "p", "chosen": [said("a")], "rejected": [said("b")], "margin": None}]
    rows[0]["prompt"] = [USER]
    write_parquet(tmp_path / "x.parquet", rows)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "x.parquet", tmp_path / "saved"):
        [judgment] = import_judgments(source, "trl").judgments
        assert (judgment.texts, judgment.strength) == (("a", "b"), None)


def test_what_is_derived_is_told_beside_the_file(tmp_path: Path) -> None:
    ranking = Judgment(
        judgment_id="1",
        task_id="1",
        prompt="p",
        completions=tuple(map(CompletionShown, "abc")),
        ranks=(1, 2, 2),
        annotator="x",
        source="random",
    )
    assert export_judgments(tmp_path / "x.jsonl", [ranking], "trl", sha256="f00") == 2
    card = (tmp_path / "x.jsonl.card.md").read_text()
    assert "2 rows from 1 judgments of the snapshot f00" in card
    assert "3 pairs of completions, 1 of them ties" in card
    with pytest.raises(DataError, match="no judgment that this format can hold"):
        export_judgments(tmp_path / "y.jsonl", [replace(ranking, ranks=(1, 1, 1))], "trl")
