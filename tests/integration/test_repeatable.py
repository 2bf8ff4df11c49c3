"""With `run.deterministic` two runs of real processes are equal to the last bit, one of them killed and resumed."""

import json
import os
import signal

import pytest

from rlhf.ppo.history import History
from support.runs import Run, wait_until
from support.tiny import tiny_reward_folder

STEPS = 6
SECONDS = ("seconds_", "epoch", "staleness")


def repeatable(folder, *, deterministic=True):
    folder.mkdir()
    threads = {"threads": 1}
    sections = {
        "run": {"deterministic": deterministic},
        "policy": {**threads, "max_sequences": 16, "max_batch_tokens": 512},
        "reward": {**threads, "rule": "", "model": str(tiny_reward_folder(folder / "reward"))},
        "reference": threads,
        # So that hidden states must be the same bits too; log-probs alone are in the run that trains an adapter.
        "kl": {"estimator": "exact"},
        "ppo": {"steps": STEPS, "batch_prompts": 8, "completions": 2, "epochs": 2, "checkpoint_every": 2},
    }
    return Run(folder, sections=sections)


def finish(running):
    output, _ = running.communicate(timeout=180)
    assert running.returncode == 0, output


def kill(run, running, name, after_steps):
    wait_until(
        lambda: running.poll() is not None or run.steps() >= after_steps,
        f"step {after_steps} before killing {name}",
        120,
    )
    assert running.poll() is None, running.communicate()[0]
    os.kill(run.processes()[name]["pid"], signal.SIGKILL)


def course(run):
    """What must be equal: weights and figures of every step."""
    history = History(run.paths.history)
    weights = [history.read(step).weights_after for step in range(1, STEPS + 1)]
    rows = [json.loads(line) for line in run.paths.metrics.read_text().splitlines()]
    figures = [{name: value for name, value in row.items() if not name.startswith(SECONDS)} for row in rows]
    return weights, figures


@pytest.mark.timeout(600)
def test_a_killed_and_resumed_run_is_the_same_to_the_last_bit(tmp_path):
    whole, interrupted = repeatable(tmp_path / "whole"), repeatable(tmp_path / "interrupted")
    running = whole.start()
    try:
        finish(running)
    finally:
        running.kill()
    running = interrupted.start()
    try:
        # Not on a checkpoint: a step is undone and made again, by policies that hold their weights in other places.
        kill(interrupted, running, "ppo", 3)
        kill(interrupted, running, "policy-0", 4)
        finish(running)
    finally:
        running.kill()
    assert "ppo died" in (interrupted.paths.logs / "run.log").read_text()
    assert course(interrupted) == course(whole)

    asked = interrupted.rlhf("replay", "--config", str(interrupted.config), "--step", str(STEPS - 1))
    output, _ = asked.communicate(timeout=120)
    assert asked.returncode == 0, output
    assert "bit-identical" in output
