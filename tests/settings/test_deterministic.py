"""What `run.deterministic` needs, and settings with others in the place of some."""

import pytest

from rlhf.errors import SettingsError
from rlhf.settings.loader import load_settings, with_overrides

ENOUGH = ["run.deterministic=true", *(f"{name}.threads=1" for name in ("policy", "reward", "reference", "ppo"))]


def test_enough_is_accepted():
    assert load_settings(overrides=ENOUGH).run.deterministic
    by_rule = [text for text in ENOUGH if not text.startswith("reward")]
    assert load_settings(overrides=[*by_rule, "reward.rule=my.py:score"]).run.deterministic


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ("run.workers=2", "run.deterministic needs run.workers to be 1"),
        ("policy.threads=2", "run.deterministic needs policy.threads to be 1: more of them round by the place"),
        ("reward.threads=2", "run.deterministic needs reward.threads to be 1: more of them round by the place"),
        ("reference.threads=2", "run.deterministic needs reference.threads to be 1: more of them round by the place"),
        ("ppo.threads=0", "run.deterministic needs ppo.threads above 0: sums depend on the number of threads"),
    ],
)
def test_what_is_missing_is_named(changed, sentence):
    with pytest.raises(SettingsError) as raised:
        load_settings(overrides=[*ENOUGH, changed])
    assert str(raised.value).startswith(sentence)


def test_stale_rollouts_are_refused():
    stale = ["ppo.max_staleness=1", "ppo.old_logprobs=service"]
    with pytest.raises(SettingsError, match=r"^run\.deterministic needs ppo\.max_staleness to be 0"):
        load_settings(overrides=[*ENOUGH, *stale])


def test_overrides_take_the_place_of_some():
    settings = load_settings(overrides=["kl.coef=0.3", "ppo.steps=7"])
    changed = with_overrides(settings, ["kl.coef=0.9"])
    assert (changed.kl.coef, changed.ppo.steps) == (0.9, 7)
    assert with_overrides(settings, []) == settings
    with pytest.raises(SettingsError, match=r"kl\.coef: .*received -1 \(--set\)"):
        with_overrides(settings, ["kl.coef=-1"])
    with pytest.raises(SettingsError, match=r"kl\.coeff: unknown setting"):
        with_overrides(settings, ["kl.coeff=1"])
