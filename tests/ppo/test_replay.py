"""`rlhf replay` against runs of the real trainer: bit-identical, or it says what is not."""

import json
import shutil
from dataclasses import replace

import pytest

from rlhf.cli.main import main
from rlhf.errors import DataError, SettingsError, StageFailed
from rlhf.ppo import loop, replay
from rlhf.ppo.history import History
from rlhf.ppo.replay_report import ranges
from rlhf.queues.connection import connect
from rlhf.settings.run import Settings
from support.answering import AnsweringWorker
from support.tiny import tiny_lm_folder, tiny_reward_folder

RULE = """
def score(items):
    return [float(len(item.tokens)) + len(item.prompt) for item in items]
"""


@pytest.fixture
def settings(tmp_path, run_name, redis_settings):
    made = Settings.model_validate(
        {
            "run": {"name": run_name, "folder": tmp_path},
            "redis": redis_settings.model_dump(),
            "ppo": {
                "steps": 5,
                "batch_prompts": 4,
                "epochs": 2,
                "minibatches": 2,
                "completions": 2,
                "checkpoint_every": 2,
                "rollout_timeout_s": 20.0,
                "lr_schedule": "linear",
                "threads": 1,
            },
            "kl": {"adaptive": True, "horizon": 100.0},
            "sampling": {"max_new_tokens": 8},
        }
    )
    tiny_lm_folder(made.paths.pretrained)
    tiny_reward_folder(made.paths.reward_model)
    made.paths.prompts.parent.mkdir(parents=True)
    made.paths.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("A fine", "The plot")))
    return made


@pytest.fixture
def finished(settings):
    """A run of 5 steps, with the checkpoints of steps 4 and 5."""
    train(settings)
    return settings


def train(settings):
    worker = AnsweringWorker(connect(settings), settings.run.name, settings.redis, lambda task: None)
    worker.start()
    try:
        loop.run(settings)
    finally:
        worker.stop()


def changed(settings, section, **values):
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def replayed(settings, *overrides, **values):
    return replay.run(changed(settings, "replay", **values), overrides)


def test_every_step_is_bit_identical_from_a_checkpoint_or_the_start(finished, capsys):
    for number in (1, 3, 5):
        assert replayed(finished, step=number)["identical"]
    output = capsys.readouterr().out
    assert "and the weights, from the run's start through 2 steps between, their weights too" in output
    assert "figures and the weights, from checkpoint 2-4\n" in output
    assert replayed(finished)["step"] == 5, "0 is the newest"


def test_a_step_after_the_run_went_on_with_other_settings(finished):
    again = changed(finished, "ppo", steps=9, lr=1e-3, checkpoint_every=100)
    train(again)
    assert replayed(again, step=8)["identical"]
    shutil.rmtree(finished.paths.checkpoints)
    assert replayed(again, step=8)["identical"], "also through the change"


def test_another_coefficient_changes_what_follows_from_it_alone(finished, capsys):
    found = replayed(finished, "kl.coef=0.9", step=5)
    was, would_be = (found["figures"][name] for name in ("recorded", "with kl.coef=0.9"))
    assert (would_be["score_mean"], would_be["kl_mean"]) == (was["score_mean"], was["kl_mean"])
    assert was["kl_coef"] != would_be["kl_coef"] == 0.9
    assert would_be["reward_mean"] != was["reward_mean"]
    assert would_be["weights"] != was["weights"]
    assert found["identical"]
    assert found["change_cosine"] < 1 - 1e-9
    assert "times as far, at a cosine of" in capsys.readouterr().out


def test_the_same_value_changes_nothing(finished):
    found = replayed(finished, "ppo.lr=3e-4", step=5)
    assert found["figures"]["with ppo.lr=3e-4"]["weights"] == found["figures"]["computed again"]["weights"]
    assert found["change_length"] == 1.0


def test_another_reward_model_and_a_rule(finished, tmp_path):
    other = tiny_reward_folder(tmp_path / "other", seed=5)
    by_model = replayed(finished, step=5, reward_model=other)["figures"]
    (name,) = by_model.keys() - {"recorded", "computed again"}
    assert name == f"with replay.reward_model={other}"
    assert by_model[name]["score_mean"] != by_model["recorded"]["score_mean"]
    (tmp_path / "rule.py").write_text(RULE)
    by_rule = replayed(finished, step=5, reward_rule=f"{tmp_path / 'rule.py'}:score")["figures"]
    (name,) = by_rule.keys() - {"recorded", "computed again"}
    # 5 tokens, and the 6 letters that every prompt has in these rollouts.
    assert by_rule[name]["score_mean"] == 11.0


def test_what_was_used_up_before_is_refused(finished):
    with pytest.raises(SettingsError, match=r"--set ppo\.seed=3: this was used up before the step"):
        replayed(finished, "ppo.seed=3")


def test_figures_or_weights_that_are_not_the_records(finished, capsys):
    rows = [json.loads(line) for line in finished.paths.metrics.read_text().splitlines()]
    rows[4]["policy_loss"] += 1e-12
    finished.paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StageFailed, match=r"step 5 is not bit-identical to what was recorded: policy_loss differ$"):
        replayed(finished, step=5)
    assert "e-" in capsys.readouterr().out


def test_a_step_between_that_came_out_different_is_named(finished):
    history = History(finished.paths.history, 2**30)
    shutil.rmtree(finished.paths.checkpoints)
    third = history.read(3)
    history.keep(replace(third, weights_after="0" * 64, machine={"threads": 1, "torch": "1.0"}))
    with pytest.raises(StageFailed, match="the weights differ from step 3 on"):
        replayed(finished, step=4)
    with pytest.raises(StageFailed, match=r"weights differ; it was made with torch 1\.0, here 2"):
        replayed(finished, step=3)


def test_steps_that_there_are_not(finished):
    with pytest.raises(DataError, match="step 6: the run has made 5 steps"):
        replayed(finished, step=6)
    history = History(finished.paths.history)
    for number in (1, 3):
        history._path(number).unlink()
    with pytest.raises(
        DataError, match=r"step 3: its rollouts are no longer kept; these can be computed again: 5\. A larger ppo\.keep"
    ):
        replayed(finished, step=3)
    with pytest.raises(DataError, match=r"checkpoints: step 2: no checkpoint before it is left.*again: 5\. A larger"):
        replayed(finished, step=2)
    shutil.rmtree(finished.paths.checkpoints)
    with pytest.raises(DataError, match=r"step 5: no checkpoint before it is left.*; no step can be computed again"):
        replayed(finished, step=5)
    shutil.rmtree(finished.paths.history)
    with pytest.raises(DataError, match="no rollouts are kept there, so no step can be computed again"):
        replayed(finished, step=5)


def test_a_start_that_was_changed_since(finished):
    shutil.rmtree(finished.paths.pretrained)
    tiny_lm_folder(finished.paths.pretrained, seed=9)
    with pytest.raises(DataError, match="the run's start has other weights than those that step 1 was made from; the"):
        replayed(finished, step=2)


def test_settings_of_another_version(finished):
    history = History(finished.paths.history, 2**30)
    fifth = history.read(5)
    history.keep(replace(fifth, settings={**fifth.settings, "ppo": {**fifth.settings["ppo"], "cleverness": 1}}))
    with pytest.raises(DataError, match=r"settings that this version does not know \(ppo\.cleverness: "):
        replayed(finished, step=5)


def test_a_row_that_is_missing(finished):
    rows = finished.paths.metrics.read_text().splitlines()
    finished.paths.metrics.write_text("".join(f"{row}\n" for row in rows[:4]))
    with pytest.raises(DataError, match="there is no row of step 5"):
        replayed(finished, step=5)


def test_the_command(finished, capsys):
    place = ["--set", f"run.folder={finished.run.folder}", "--run", finished.run.name]
    assert main(["replay", *place, "--step", "5", "--set", "kl.coef=0.9"]) == 0
    output = capsys.readouterr().out
    assert f"step 5 of {finished.run.name}: 4 rollouts, in epoch 0" in output
    header, scores = (next(line for line in output.splitlines() if word in line) for word in ("recorded", "score_mean"))
    assert header.split("  ")[-1].strip() == "with kl.coef=0.9"
    assert scores.split()[2:] == ["=", "="]
    assert main(["replay", *place, "--step", "50"]) == 2
    assert "step 50: the run has made 5 steps" in capsys.readouterr().err


def test_ranges():
    assert ranges([7, 3, 8, 9, 12]) == "3, 7 to 9, 12"
