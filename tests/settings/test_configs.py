"""Every file in configs/ is a run that would be accepted, and the rules it names in that folder can be scored with."""

from pathlib import Path

import pytest

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
