"""A folder of real texts becomes the parts of a run, and no part sees what another must not have seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.data.rows import read_rows, write_rows
from rlhf.data.settings import DataSettings
from rlhf.data.split import run
from rlhf.errors import DataError, SettingsError
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings

TEXTS = [f"film {n} has a plot number {n} and it is a fine one" for n in range(200)]
LABELLED = [(f"opinion {n}", ("positive", "negative")[n % 2]) for n in range(61)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # The first text twice, and one that is too short to begin anything.
    write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in [*TEXTS, TEXTS[0], "fine"]])
    write_rows(tmp_path / "labelled.jsonl", [{"text": text, "label": label} for text, label in LABELLED])
    return tmp_path


def settings(here: Path, **data: Any) -> Settings:
    counts = {"heldout_texts": 60, "prompts": 100, "heldout_prompts": 20, "validation_prompts": 30}
    section = DataSettings(**{"folder": here, **counts, **data})
    return Settings(run=RunSettings(folder=here / "runs", name="r"), data=section)


def column(path: Path, name: str) -> list[str]:
    return [row.text(name) for row in read_rows(path)]


def test_no_text_and_no_prompt_is_on_two_sides(folder: Path) -> None:
    chosen = settings(folder)
    figures = run(chosen)
    paths = chosen.paths
    texts, heldout = column(paths.texts, "text"), column(paths.heldout_texts, "text")
    assert sorted(texts + heldout) == sorted([*TEXTS, "fine"])
    assert len(heldout) == 60
    prompts = column(paths.prompts, "prompt")
    final, validation = column(paths.heldout_prompts, "prompt"), column(paths.validation_prompts, "prompt")
    assert len({*prompts, *final, *validation}) == len(prompts) + len(final) + len(validation) == 150
    assert figures["validation_prompts"] == 30
    for some, whole in ((prompts, texts), (final + validation, heldout)):
        assert all(any(text.startswith(prompt + " ") for text in whole) for prompt in some)
        assert {len(prompt.split()) for prompt in some} == {3, 4, 5, 6, 7}


def test_annotators_and_judge_learn_from_different_halves(folder: Path) -> None:
    chosen = settings(folder)
    run(chosen)
    halves = [
        [(row.text("text"), row.text("label")) for row in read_rows(path)]
        for path in (chosen.paths.annotators_labelled, chosen.paths.labelled)
    ]
    assert sorted(halves[0] + halves[1]) == sorted(LABELLED)
    assert [len(half) for half in halves] == [31, 30]


def test_held_out_prompts_stay_held_out_where_texts_begin_alike(folder: Path) -> None:
    alike = [f"the film number {n % 150} is what {n} is about" for n in range(200)]
    write_rows(folder / "corpus.jsonl", [{"text": text} for text in alike])
    chosen = settings(folder, prompt_words=(4, 4), prompts=50, heldout_prompts=5, validation_prompts=5)
    run(chosen)
    unseen = column(chosen.paths.heldout_prompts, "prompt") + column(chosen.paths.validation_prompts, "prompt")
    assert not set(unseen) & set(column(chosen.paths.prompts, "prompt"))


def test_the_seed_decides_the_split(folder: Path) -> None:
    chosen = settings(folder)
    run(chosen)
    first = chosen.paths.heldout_prompts.read_text()
    run(chosen)
    assert chosen.paths.heldout_prompts.read_text() == first
    run(settings(folder, seed=1))
    assert chosen.paths.heldout_prompts.read_text() != first


def test_what_cannot_be_split_is_named(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.folder: not set"):
        run(settings(folder, folder=None))
    with pytest.raises(DataError, match=r"nowhere/corpus\.jsonl: no such file"):
        run(settings(folder, folder=folder / "nowhere"))
    with pytest.raises(DataError, match=r"has 201 different texts, no more than data\.heldout_texts"):
        run(settings(folder, heldout_texts=201))
    with pytest.raises(SettingsError, match=r"data\.prompts: the texts give only \d+ of 500 prompts"):
        run(settings(folder, prompts=500))
    with pytest.raises(SettingsError, match=r"data\.validation_prompts: the texts give only \d\d of 100"):
        run(settings(folder, validation_prompts=100))
