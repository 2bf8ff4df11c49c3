import logging
import socket
from pathlib import Path
from types import NoneType

import pytest

from rlhf.errors import SettingsError
from rlhf.settings.loader import _alternatives, load_settings, sections, setting_names, variable


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(**sources: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(**sources)  # type: ignore[arg-type]
    return str(caught.value)


def test_later_sources_win(tmp_path: Path) -> None:
    first = write(tmp_path, "[ppo]\nsteps = 1\nbatch_prompts = 1\nepochs = 1\nminibatches = 1\nseed = 1\n")
    second = write(tmp_path, "[ppo]\nbatch_prompts = 2\nepochs = 2\nminibatches = 2\nseed = 2\n", "more.toml")
    ppo = load_settings(
        files=[first, second],
        environment={"RLHF_PPO_EPOCHS": "3", "RLHF_PPO_MINIBATCHES": "3", "RLHF_PPO_SEED": "3"},
        overrides=["ppo.minibatches=4", "ppo.seed=4"],
        flags={"ppo.seed": "5"},
    ).ppo
    assert (ppo.steps, ppo.batch_prompts, ppo.epochs, ppo.minibatches, ppo.seed) == (1, 2, 3, 4, 5)
    assert ppo.checkpoint_every == 10


def test_no_two_settings_share_a_variable() -> None:
    variables = [variable(name) for name in setting_names()]
    assert len(variables) > 150
    assert len(set(variables)) == len(variables)


def test_every_setting_has_its_variable() -> None:
    settings = load_settings(environment={"RLHF_REDIS_URL": "redis://elsewhere:6379", "RLHF_REWARD_MODEL_LR": "0.5"})
    assert settings.redis.url == "redis://elsewhere:6379"
    assert settings.reward_model.lr == 0.5


def test_an_empty_variable_is_not_set() -> None:
    assert load_settings(environment={"RLHF_POLICY_MODEL": "", "RLHF_PPO_STEPS": ""}) == load_settings()


def test_an_unknown_variable_is_warned_about_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_settings(environment={"RLHF_PPO_STEP": "3", "HOME": "/root"})
    assert [record.getMessage() for record in caplog.records] == [
        "RLHF_PPO_STEP is no setting and is ignored; did you mean RLHF_PPO_STEPS?"
    ]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("ppo.steps=50", 50),
        ("ppo.lr=1e-4", 1e-4),
        ("kl.adaptive=true", True),
        ("run.name=2024-01-01", "2024-01-01"),
        ("run.name='quoted'", "quoted"),
        ('run.stages=["ppo", "report"]', ("ppo", "report")),
        ("rank.reliabilities=[1, 0.5]", (1.0, 0.5)),
        ("ppo.model=models/true", Path("models/true")),
        ("ppo.model=none", None),
        ("ppo.score_clip=none", None),
        ("reward.rule=none", "none"),
        ('redis.url="a=b"', "a=b"),
        ("redis.url=unix:///tmp/a=b\n[x]", "unix:///tmp/a=b\n[x]"),
    ],
)
def test_values_are_toml_and_text_needs_no_quotes(override: str, value: object) -> None:
    section, field = override.partition("=")[0].split(".")
    assert getattr(getattr(load_settings(overrides=[override]), section), field) == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo.setps=3", "ppo.setps: unknown setting; did you mean ppo.steps?"),
        ("ppo.temperature=3", "ppo.temperature: unknown setting; did you mean sampling.temperature?"),
        ("pop.steps=3", "pop.steps: unknown setting; did you mean ppo.steps?"),
        ("steps=3", "steps: unknown setting; did you mean ppo.steps?"),
        ("ppo.steps", "--set ppo.steps: write --set section.field=value"),
        ("ppo.steps=0", "ppo.steps: must be greater than 0; received 0 (--set)"),
        ("critic.kind=sharde", "critic.kind: must be 'separate' or 'shared'; received \"sharde\" (--set)"),
        ("rank.reliabilities=[]", "rank.reliabilities: needs at least one number, each from 0.5 (guesses) to 1"),
        ("run.name=a/b", "run.name: must match pattern"),
        ("ppo.lr=inf", "ppo.lr: must be a finite number"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name_rule_and_value(override: str, sentence: str) -> None:
    assert refusal(overrides=[override]).startswith(sentence)


def test_a_combination_that_makes_no_sense_is_refused() -> None:
    message = refusal(overrides=["kl.adaptive=true", "kl.coef=0"])
    assert message == "kl: adaptive multiplies the coefficient, so coef must be above 0"


def test_the_refusal_says_where_the_value_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, "[ppo]\nsteps = -1\n")
    assert refusal(files=[path]) == f"ppo.steps: must be greater than 0; received -1 ({path})"
    assert refusal(environment={"RLHF_PPO_STEPS": "-2"}).endswith("received -2 (RLHF_PPO_STEPS)")
    assert refusal(flags={"ppo.batch_prompts": "-3"}).endswith("received -3 (--batch-prompts)")


def test_a_file_with_unknown_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "[ppo]\nsetps = 3\n")
    assert refusal(files=[path]) == f"{path}: ppo.setps: unknown setting; did you mean ppo.steps?"
    path = write(tmp_path, "[reward-model]\nlr = 3\n")
    assert refusal(files=[path]) == f"{path}: [reward-model] is no section; did you mean reward_model?"
    path = write(tmp_path, "ppo = 3\n")
    assert refusal(files=[path]) == f"{path}: ppo is a section with fields, written as [ppo]; got 3"


def test_a_file_that_cannot_be_read_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[ppo]\n\nsteps = = 3\n")
    assert refusal(files=[path]) == f"{path}:3: not TOML: Invalid value"
    path = write(tmp_path, "[ppo]\nprompts = '''\n")
    assert refusal(files=[path]).startswith(f"{path}:3: not TOML: ")
    path.write_bytes(b"[ppo]\nprompts = '\xff'\n")
    assert refusal(files=[path]) == f"{path}:2: not UTF-8 text"
    assert (
        refusal(files=[tmp_path / "none.toml"])
        == f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory"
    )
    path = write(tmp_path, "{\n'ppo'", "run.json")
    assert refusal(files=[path]).startswith(f"{path}:2: not JSON: ")
    assert refusal(files=[write(tmp_path, "3", "run.json")]).endswith("must hold an object of sections; got 3")


def test_settings_come_back_from_the_json_they_are_written_as(tmp_path: Path) -> None:
    settings = load_settings(overrides=["run.stages=['evaluate']", "ppo.model=a/b", "run.min_judge_gain=0.1"])
    path = write(tmp_path, settings.model_dump_json(), "settings.json")
    assert load_settings(files=[path]) == settings


def test_a_field_that_may_be_none_is_none_by_default() -> None:
    """TOML has no null, so leaving such a field out must be a way to say it."""
    for name, section in sections().items():
        for field, info in section.model_fields.items():
            if NoneType in _alternatives(info.annotation):
                assert info.default is None, f"{name}.{field}"


def test_every_setting_has_a_default_and_a_description() -> None:
    for name, section in sections().items():
        for field, info in section.model_fields.items():
            assert not info.is_required(), f"{name}.{field}"
            assert info.description, f"{name}.{field}"


def test_a_process_without_a_name_goes_by_its_machines() -> None:
    settings = load_settings(environment={"RLHF_POLICY_NAME": '""'}, overrides=['rollouts.consumer=""'])
    assert settings.policy.name == settings.rollouts.consumer == socket.gethostname()
    assert load_settings().policy.name == "policy-0"
