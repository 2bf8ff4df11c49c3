"""Every file in configs/ is a run that would be accepted, and the rules it names in that folder can be scored with."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from rlhf.data.rows import read_rows
from rlhf.data.sentiment import read_labelled
from rlhf.reward.rules import ScoreItem, load_rule
from rlhf.settings.loader import load_settings

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_loads_and_says_what_it_is(path):
    settings = load_settings(files=[path])
    assert settings.run.name != "run"
    assert f"rlhf run configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_rules_of_a_config_are_there(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_settings(files=[path])
    for name in {settings.reward.rule, settings.evaluate.reward_rule} - {""}:
        assert load_rule(name).score([ScoreItem("The film was", " fine.")]).shape == (1,)


def test_the_sentiment_rule_turns_with_the_wish():
    rule = load_rule(f"{ROOT}/configs/sentiment_rule.py:sentiment")
    texts = [" brilliant, moving.", " a dull film!", " a film."]
    wanted = [ScoreItem("The film was", text, metadata={"wanted": "positive"}) for text in texts]
    unwanted = [ScoreItem("The film was", text, metadata={"wanted": "negative"}) for text in texts]
    assert rule.score(wanted).tolist() == [1.0, -1.0, 0.0]
    assert rule.score(unwanted).tolist() == [-1.0, 1.0, 0.0]


def test_movie_reviews_are_laid_out_from_the_public_archives(tmp_path: Path) -> None:
    reviews = {
        "poldata.README.2.0": b"about",
        "txt_sentoken/pos/cv000_1.txt": b"a  fine film . \nagain !\n",
        "txt_sentoken/neg/cv000_2.txt": b"dull\n\n",
    }
    sentences = {"rt/rt-polarity.pos": b"caf\xe9 life \n", "rt/rt-polarity.neg": b"no\n", "rt/README.txt": b"about"}
    archives = [archive(tmp_path / "a.tar.gz", reviews), archive(tmp_path / "b.tar.gz", sentences)]
    script = [sys.executable, str(ROOT / "configs" / "movie_reviews_data.py")]
    subprocess.run([*script, *archives, str(tmp_path / "out")], check=True, timeout=60)
    assert [row.fields for row in read_rows(tmp_path / "out" / "corpus.jsonl")] == [
        {"text": "dull"},
        {"text": "a fine film ."},
        {"text": "again !"},
    ]
    assert list(read_labelled(tmp_path / "out" / "labelled.jsonl")) == [("no", "negative"), ("café life", "positive")]
    swapped = subprocess.run(
        [*script, *reversed(archives), str(tmp_path / "out")], capture_output=True, text=True, timeout=60
    )
    assert swapped.returncode == 1
    assert "holds no lines for corpus.jsonl" in swapped.stderr


def archive(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)
