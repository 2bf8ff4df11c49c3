"""`rlhf annotate` as a command: what it refuses, what it prints, what it loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.annotate.answers import Answer, Form, submit
from rlhf.annotate.assigning import Rules, claim
from rlhf.annotate.server import open_store, run, tasks_from_samples
from rlhf.annotate.settings import AnnotateSettings
from rlhf.data.samples import Sampled, SampledCompletion
from rlhf.errors import SettingsError
from rlhf.feedback.judgments import read_judgments
from rlhf.settings.loader import load_settings
from rlhf.settings.run import Settings
from rlhf.wire.records import FinishReason, Sampling, WeightVersion
from support.annotating import NOW, add_person, task


def settings_of(folder: Path, *overrides: str) -> Settings:
    given = [f"run.folder={folder}", *(f"annotate.{each}" for each in overrides)]
    return load_settings(overrides=given)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["host=0.0.0.0"], "can be reached from other machines"),
        (["tls_cert=cert.pem"], "belong together"),
        (["tls_cert=cert.pem", "tls_key=key.pem"], "no file cert.pem"),
        (["invite=lead", "port=0"], "port or public_url"),
        (["guidelines=nowhere.txt", "port=0"], "nowhere.txt cannot be read"),
    ],
)
def test_what_is_refused(tmp_path: Path, overrides: list[str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        run(settings_of(tmp_path, *overrides))


def test_an_invitation_is_a_link_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(settings_of(tmp_path, "invite=annotator", "public_url=https://rank.example.org/"))
    assert capsys.readouterr().out.startswith("https://rank.example.org/join/")


def test_the_export_is_read_by_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(tmp_path, f"export={tmp_path / 'out.parquet'}")
    store = open_store(settings)
    who = add_person(store, "ada")
    store.add_tasks([task()])
    mine = claim(store.database, who, Rules(repeat_share=0, gold_share=0), NOW)
    assert mine is not None
    form = Form(mine.id, mine.fence, "a key of it")
    submit(store.database, who, form, Answer((1, 2, 2)), revision=0, now=NOW, per_minute=9)
    run(settings)
    assert "1 judgments in" in capsys.readouterr().out
    assert read_judgments(tmp_path / "out.parquet") == store.judgments()
    store.close()


def test_samples_become_tasks() -> None:
    completion = SampledCompletion("text", (1,), (-0.1,), FinishReason.EOS, 5)
    version = WeightVersion(run_id="r", epoch=1, step=2, sha256="ab")
    sampled = [
        Sampled(number, f"prompt {number}", {"n": "1"}, (completion, completion), Sampling(temperature=0.7), version)
        for number in range(200)
    ]
    tasks = list(tasks_from_samples(sampled, AnnotateSettings(need=2, overlap=0.25, kind="pair")))
    assert tasks == list(tasks_from_samples(sampled, AnnotateSettings(need=2, overlap=0.25, kind="pair")))
    assert {each.need for each in tasks} == {2, 3}
    assert 30 < sum(each.need == 3 for each in tasks) < 70
    assert tasks[7].completions[1].id == "7.1"
    assert tasks[7].completions[1].policy_version == str(version)
    assert tasks[7].completions[1].sampling == {"temperature": 0.7, "seed": 5}
    assert len({each.task_id for each in tasks}) == 200
