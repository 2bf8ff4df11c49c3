import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main as cli
from rlhf.cli.arguments import parse
from rlhf.cli.records import stage_settings
from rlhf.cli.verbs import BY_NAME, VERBS
from rlhf.errors import ModelError, SettingsError, StorageError, Unavailable
from rlhf.ppo.settings import PpoSettings
from rlhf.settings.loader import sections, setting_names
from rlhf.settings.run import Settings


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for the module of `rlhf pretrain`."""
    module = types.ModuleType("stand_in")
    monkeypatch.setitem(sys.modules, BY_NAME["pretrain"].module, module)
    return module


def arguments(folder: Path) -> list[str]:
    return ["pretrain", "--set", f"run.folder={folder}", "--run", "one", "--steps", "7"]


def test_help_answers_without_torch() -> None:
    """For the whole command and for the verb with the most settings."""
    code = (
        "import sys, contextlib\n"
        "from rlhf.cli.main import main\n"
        "for arguments in (['--help'], ['ppo', '--help'], ['policy', '--help']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(arguments)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(verb.name in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_explains_every_option_with_its_default(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([*verb.name.split(), "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, info in sections()[verb.section].model_fields.items():
        if verb.options and name not in verb.options:
            assert f"--{name.replace('_', '-')} " not in out
            continue
        assert f"--{name.replace('_', '-')} " in out
        assert " ".join((info.description or "-").split()) in out
    for section in verb.reads:
        assert all(f"{section}.{field}=" in out for field in sections()[section].model_fields)
    for common in ("--config FILE", "--set SECTION.FIELD=VALUE", "--run NAME"):
        assert common in out


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["ppo", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--steps INT Optimisation steps: batches of rollouts. [40]" in out
    assert "kl.coef=NUMBER" in out


def test_a_verbs_names_are_real() -> None:
    for verb in VERBS:
        assert verb.section in sections()
        assert set(verb.options) <= set(sections()[verb.section].model_fields)
        assert set(verb.reads) <= set(sections())
        assert {name for name in verb.decided_by if "." not in name} <= set(sections())
        assert {name for name in verb.decided_by if "." in name} <= set(setting_names())
        assert {f"{verb.section}.{name}" for name in verb.regardless_of} <= set(setting_names())


def test_where_a_service_is_decides_nothing() -> None:
    """The supervisor gives the trainer another address in every run, and a finished stage stays finished."""
    settings, elsewhere = (Settings(ppo=PpoSettings(reference=f"127.0.0.1:{port}")) for port in (1, 2))
    ppo = BY_NAME["ppo"]
    assert stage_settings(ppo, settings) == stage_settings(ppo, elsewhere)
    assert stage_settings(ppo, settings) != stage_settings(ppo, Settings(ppo=PpoSettings(steps=1)))


def test_options_become_settings_and_the_last_word() -> None:
    found = parse(["ppo", "--config", "a.toml", "--config=b.toml", "--run", "x", "--steps=5", "--whiten-rewards"])
    assert [str(path) for path in found.files] == ["a.toml", "b.toml"]
    assert found.flags == {"run.name": "x", "ppo.steps": "5", "ppo.whiten_rewards": "true"}
    assert parse(["run", "c.toml", "--fresh", "--config", "d.toml"]).files == (Path("c.toml"), Path("d.toml"))
    assert parse(["run", "c.toml", "--fresh"]).fresh
    assert not parse(["demo"]).fresh


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["ppoo"], "rlhf: ppoo: no such verb; did you mean ppo?"),
        (["ppo", "--setps", "4"], "rlhf ppo: --setps: unknown option; did you mean --steps?"),
        (["ppo", "--step", "4"], "rlhf ppo: --step: unknown option; did you mean --steps?"),
        (["ppo", "--steps"], "rlhf ppo: argument --steps: expected one argument"),
        (["ppo", "--steps", "0"], "rlhf ppo: ppo.steps: must be greater than 0; received 0 (--steps)"),
        (["run"], "rlhf run: the following arguments are required: CONFIG"),
        (["run", "none.toml"], "rlhf run: none.toml: cannot be read: No such file or directory"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused_in_a_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == SettingsError.exit_code == 2
    assert capsys.readouterr().err == sentence + "\n"


def test_a_finished_stage_leaves_its_record(verb: Any, tmp_path: Path) -> None:
    seen: list[Settings] = []

    def run(settings: Settings) -> dict[str, float]:
        seen.append(settings)
        assert (tmp_path / "one/stages/pretrain.started").exists()
        return {"lm_perplexity": 7.5}

    verb.run = run
    assert cli.main(arguments(tmp_path)) == 0
    record = json.loads((tmp_path / "one/stages/pretrain.json").read_text())
    assert record["figures"] == {"lm_perplexity": 7.5}
    assert record["settings"]["pretrain"]["steps"] == seen[0].pretrain.steps == 7
    assert 0 <= record["seconds"] < 60
    assert not (tmp_path / "one/stages/pretrain.started").exists()
    assert re.search(r"done in .* s: lm_perplexity 7\.5\n", (tmp_path / "one/logs/pretrain.log").read_text())


@pytest.mark.parametrize("error", [ModelError("no model"), Unavailable("no answer")])
def test_an_error_is_one_sentence_and_its_exit_code(
    error: Any, verb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Settings) -> None:
        raise error

    verb.run = run
    assert cli.main(arguments(tmp_path)) == error.exit_code
    assert capsys.readouterr().err == f"rlhf pretrain: {error}\n"
    assert (tmp_path / "one/logs/pretrain.log").read_text() == f"rlhf pretrain: {error}\n"
    assert not (tmp_path / "one/stages/pretrain.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_a_full_disk_has_its_exit_code_although_the_log_takes_nothing(
    verb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Settings) -> None:
        log = tmp_path / "one/logs/pretrain.log"
        log.unlink()
        log.symlink_to("/dev/full")
        raise StorageError("no space")

    verb.run = run
    assert cli.main(arguments(tmp_path)) == StorageError.exit_code == 6
    assert capsys.readouterr().err == "rlhf pretrain: no space\n"


def test_ctrl_c_is_130_and_a_bug_a_traceback(verb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(settings: Settings) -> None:
        raise KeyboardInterrupt

    def broken(settings: Settings) -> None:
        raise ZeroDivisionError("here")

    verb.run = interrupted
    assert cli.main(arguments(tmp_path)) == 130
    verb.run = broken
    assert cli.main(arguments(tmp_path)) == 1
    assert "Traceback" in capsys.readouterr().err
    assert "ZeroDivisionError: here" in (tmp_path / "one/logs/pretrain.log").read_text()
