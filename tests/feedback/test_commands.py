"""`rlhf feedback` from the command line: a snapshot from files, out again, and without an annotator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.annotate.accounts import set_state
from rlhf.annotate.store import Store
from rlhf.cli.main import main
from rlhf.data.rows import write_rows
from rlhf.feedback.judgments import CompletionShown, Judgment, read_judgments, write_judgments
from rlhf.feedback.snapshots import read_snapshot, snapshot_of
from rlhf.feedback.withdrawn import withdrawn
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from support.annotating import add_person
from support.tiny import tiny_lm_folder


def judged(number: int, annotator: str) -> Judgment:
    return Judgment(
        judgment_id=f"{number}/{annotator}",
        task_id=str(number),
        prompt=f"Film {number}:",
        completions=(
            CompletionShown(" good", policy_version="v"),
            CompletionShown(f" dull {number}", policy_version="v"),
        ),
        ranks=(1, 2) if annotator != "mallory" else (2, 1),
        annotator=annotator,
        source="random",
    )


ROWS = [judged(number, annotator) for number in range(12) for annotator in ("ann", "bob", "mallory")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that the commands work in, with judgments to import beside it."""
    monkeypatch.chdir(tmp_path)
    write_judgments(tmp_path / "j.jsonl", ROWS)
    return tmp_path / "runs" / "r"


def feedback(*words: str) -> int:
    return main(["feedback", *words, "--run", "r"])


def test_import_stats_export_withdraw(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert feedback("import", "--source", "j.jsonl") == 0
    assert "imported 36 judgments from j.jsonl: 0 bad rows left out, 0 duplicates, 36 new" in capsys.readouterr().out
    assert feedback("import", "--source", "j.jsonl") == 0
    assert f"36 new\nsnapshot {snapshot_of(ROWS).sha256}" not in (again := capsys.readouterr().out)
    assert " 0 new\n" in again

    assert feedback("stats") == 0
    shown = capsys.readouterr().out
    assert "pairwise agreement    0.333" in shown
    assert "ann 12, bob 12, mallory 12" in shown

    assert feedback("export", "--out", "out.jsonl", "--format", "trl") == 0
    assert "wrote 36 rows to out.jsonl" in capsys.readouterr().out
    assert read_snapshot(run / "feedback").sha256 in Path("out.jsonl.card.md").read_text()

    assert feedback("withdraw", "--annotator", "mallory") == 0
    told = capsys.readouterr().out
    assert "withdrew 12 judgments of mallory" in told
    assert "train the reward model again: rlhf reward-model --run r --comparisons runs/r/feedback" in told
    left = [row for row in ROWS if row.annotator != "mallory"]
    assert read_snapshot(run / "feedback").sha256 == snapshot_of(left).sha256
    assert "mallory" not in (run / "feedback" / "judgments.jsonl").read_text()

    assert feedback("import", "--source", "j.jsonl") == 0
    assert read_snapshot(run / "feedback").sha256 == snapshot_of(left).sha256


def test_sources_join_in_one_snapshot(run: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    write_rows(Path("web.jsonl"), rows)
    assert feedback("import", "--source", "j.jsonl") == 0
    assert feedback("import", "--source", "web.jsonl", "--format", "trl") == 0
    snapshot = read_snapshot(run / "feedback")
    assert (len(snapshot.judgments), snapshot.sources) == (39, ("j", "web"))


def test_a_bad_row_stops_and_nothing_changes_or_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"}\n')
    bad = ("import", "--source", "bad.jsonl", "--format", "trl")
    assert feedback(*bad) == 2
    assert "bad.jsonl:2: " in capsys.readouterr().err
    assert not (run / "feedback").exists()
    assert feedback(*bad, "--on-bad", "skip") == 0
    told = capsys.readouterr()
    assert "imported 1 judgments from bad.jsonl: 1 bad rows left out" in told.out
    assert "left out: bad.jsonl:2: " in told.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ""),
        (("import",), "feedback.source: say what to import"),
        (("import", "--source", "j.jsonl", "--format", "hhh"), "'hhh' cannot be read; there are native"),
        (("import", "--source", "none.jsonl"), "no such file"),
        (("stats",), "there is no snapshot"),
        (("export", "--format", "trl"), "feedback.out: say where"),
        (("withdraw",), "feedback.annotator: say whom"),
        (("withdrow",), "feedback withdrow: no such verb; did you mean feedback withdraw?"),
        (("stats", "--annotator", "x"), "--annotator: unknown option"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    if not words:
        with pytest.raises(SystemExit) as stopped:
            main(["feedback", "--help"])
        assert stopped.value.code == 0
        assert "feedback withdraw" in capsys.readouterr().out
        return
    assert feedback(*words) == 2
    assert said in capsys.readouterr().err


def test_nobody_of_that_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feedback("import", "--source", "j.jsonl")
    assert feedback("withdraw", "--annotator", "eve") == 2
    assert "has no judgments of eve" in capsys.readouterr().err
    assert read_snapshot(run / "feedback").withdrawn == ()


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "reward_model.json").read_text())
    return found


def test_the_reward_model_names_its_snapshot_and_is_made_again_without_the_withdrawn(run: Path) -> None:
    tiny_lm_folder(Path("start"))
    about = ["--set", "reward_model.init_from=start", "--set", "reward_model.lr=0.01"]
    feedback("import", "--source", "j.jsonl")
    assert main(["reward-model", "--run", "r", "--comparisons", str(run / "feedback"), *about]) == 0
    assert facts(run / "reward-model")["snapshot_sha256"] == snapshot_of(ROWS).sha256

    assert feedback("withdraw", "--annotator", "mallory", "--retrain", *about) == 0
    left = [row for row in ROWS if row.annotator != "mallory"]
    assert facts(run / "reward-model")["snapshot_sha256"] == snapshot_of(left).sha256
    # As if they had never been there: the same judgments from a file make the same model.
    write_judgments(Path("left.jsonl"), sorted(left, key=lambda row: row.judgment_id))
    assert main(["reward-model", "--run", "never", "--comparisons", "left.jsonl", *about]) == 0
    never = run.with_name("never") / "reward-model"
    assert facts(never)["snapshot_sha256"] == snapshot_of(left).sha256
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run / "reward-model", never)]
    assert weights[0] == weights[1]


@pytest.fixture
def page(run: Path) -> Iterator[Store]:
    """The run's annotation page, where the three of ROWS have accounts."""
    run.mkdir(parents=True)
    store = Store(f"sqlite:///{run / 'annotate.db'}")
    add_person(store, "lea", "lead")
    for name in ("ann", "bob", "mallory"):
        add_person(store, name, pseudonym=name)
    yield store
    store.close()


def test_who_is_withdrawn_on_the_page_is_in_no_snapshot_export_or_reward_model(
    run: Path, page: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_lm_folder(Path("start"))
    about = ["--set", "reward_model.init_from=start"]
    left = snapshot_of(row for row in ROWS if row.annotator != "mallory")
    feedback("import", "--source", "j.jsonl")
    set_state(page.database, 4, "withdrawn")

    for source in ("j.jsonl", str(run / "feedback")):
        assert main(["reward-model", "--run", "r", "--comparisons", source, *about]) == 0
        assert facts(run / "reward-model")["snapshot_sha256"] == left.sha256

    before = (run / "feedback" / "judgments.jsonl").read_bytes()
    capsys.readouterr()
    assert feedback("stats") == 0
    assert "annotators            ann 12, bob 12\n" in capsys.readouterr().out
    assert (run / "feedback" / "judgments.jsonl").read_bytes() == before, "it only reads"
    assert feedback("export", "--out", "out.jsonl") == 0
    assert "left out 12 judgments of mallory, withdrawn on the annotation page" in capsys.readouterr().out
    assert tuple(read_judgments(Path("out.jsonl"))) == left.judgments
    assert read_snapshot(run / "feedback").sha256 == left.sha256
    assert feedback("import", "--source", "j.jsonl") == 0
    assert read_snapshot(run / "feedback").sha256 == left.sha256


def test_who_is_withdrawn_from_the_snapshot_is_trained_on_from_no_other_file(run: Path) -> None:
    tiny_lm_folder(Path("start"))
    feedback("import", "--source", "j.jsonl")
    assert feedback("withdraw", "--annotator", "mallory") == 0
    about = ["--comparisons", "j.jsonl", "--set", "reward_model.init_from=start"]
    assert main(["reward-model", "--run", "r", *about]) == 0
    assert facts(run / "reward-model")["snapshot_sha256"] == read_snapshot(run / "feedback").sha256


def test_withdrawing_reaches_the_page(run: Path, page: Store, capsys: pytest.CaptureFixture[str]) -> None:
    # Before anything is imported too.
    assert feedback("withdraw", "--annotator", "bob") == 0
    assert "bob is withdrawn on the annotation page" in capsys.readouterr().out
    feedback("import", "--source", "j.jsonl")
    assert feedback("withdraw", "--annotator", "mallory") == 0
    assert "withdrew 12 judgments of mallory" in capsys.readouterr().out
    assert withdrawn(Settings(run=RunSettings(name="r"))) == {"bob", "mallory"}
    assert {row.annotator for row in read_snapshot(run / "feedback").judgments} == {"ann"}

    assert feedback("withdraw", "--annotator", "a-lea!") == 2
    assert "the last lead cannot be" in capsys.readouterr().err


def test_an_altered_snapshot_trains_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lm_folder(Path("start"))
    feedback("import", "--source", "j.jsonl")
    write_judgments(run / "feedback" / "judgments.jsonl", ROWS[:5])
    arguments = ["--comparisons", str(run / "feedback"), "--set", "reward_model.init_from=start"]
    assert main(["reward-model", "--run", "r", *arguments]) == 2
    assert "holds other rows than snapshot.json says" in capsys.readouterr().err
    assert len(read_judgments(run / "feedback")) == 5
