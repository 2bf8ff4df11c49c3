"""A run of real processes that trains an adapter: it learns, and a kill changes not a bit of it."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf.models.causal import load_causal_lm
from rlhf.models.weights import WEIGHTS_FILE, named_weights, read_manifest
from rlhf.ppo.history import History
from support.runs import Run, wait_until

RULE = """
def score(items):
    return [sum(token < 100 for token in item.tokens) / 8 for item in items]
"""
LORA = {"rank": 4, "alpha": 8, "target_modules": "all-linear"}
STEPS = 6
SECONDS = ("seconds_", "epoch", "staleness")


def run_to_the_end(run, during=lambda running: None):
    running = run.start()
    try:
        during(running)
        output, _ = running.communicate(timeout=180)
    finally:
        running.kill()
    assert running.returncode == 0, output


def rows(run):
    return [json.loads(line) for line in run.paths.metrics.read_text().splitlines()]


@pytest.mark.timeout(400)
def test_an_adapter_learns_a_rule_through_the_services(tmp_path):
    ppo = {"steps": 30, "batch_prompts": 32, "epochs": 2, "lr": 1e-2, "checkpoint_every": 10}
    run = Run(tmp_path, rule=RULE, sections={"lora": LORA, "ppo": ppo, "kl": {"coef": 0.01}, "critic": {"lr": 1e-2}})
    run_to_the_end(run)
    found = rows(run)
    scores = [row["score_mean"] for row in found]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.2, scores
    # Of the weights that the policy merged, against base and adapter as the trainer computes them.
    names = {diagnosis["name"] for row in found for diagnosis in row["diagnoses"]}
    assert not names & {"policy_logprobs", "first_ratio", "start_kl", "replica_weights"}, names

    newest = max(run.paths.weights.iterdir(), key=lambda folder: int(folder.name.split("-")[1]))
    assert read_manifest(newest).adapter is not None
    assert all(".lora_" in name for name in load_file(newest / WEIGHTS_FILE))
    trained, start = (named_weights(load_causal_lm(folder)) for folder in (run.paths.policy, run.paths.pretrained))
    assert trained["model.embed_tokens.weight"].equal(start["model.embed_tokens.weight"])
    assert not trained["model.layers.0.mlp.up_proj.weight"].equal(start["model.layers.0.mlp.up_proj.weight"])
    assert torch.isfinite(trained["model.layers.0.mlp.up_proj.weight"]).all()

    audit = run.rlhf("audit", "--config", str(run.config))
    output, _ = audit.communicate(timeout=60)
    assert audit.returncode == 0, output


def repeatable(folder):
    folder.mkdir()
    sections = {
        "run": {"deterministic": True},
        "policy": {"max_sequences": 16, "max_batch_tokens": 512},
        "lora": {**LORA, "dropout": 0.1},
        "ppo": {"steps": STEPS, "completions": 2, "epochs": 2, "lr": 1e-2, "checkpoint_every": 2},
    }
    return Run(folder, rule=RULE, sections=sections)


def course(run):
    """What must be equal: weights and figures of every step."""
    history = History(run.paths.history)
    weights = [history.read(step).weights_after for step in range(1, STEPS + 1)]
    return weights, [{name: row[name] for name in row if not name.startswith(SECONDS)} for row in rows(run)]


@pytest.mark.timeout(400)
def test_a_killed_and_resumed_run_is_the_same_to_the_last_bit(tmp_path):
    whole, interrupted = repeatable(tmp_path / "whole"), repeatable(tmp_path / "interrupted")

    def kill(running):
        # Not on a checkpoint: a step is undone and made again, by a policy that merges the adapter anew.
        for name, after_steps in (("ppo", 3), ("policy-0", 4)):
            wait_until(
                lambda after_steps=after_steps: running.poll() is not None or interrupted.steps() >= after_steps,
                f"step {after_steps} before killing {name}",
                120,
            )
            assert running.poll() is None, running.communicate()[0]
            os.kill(interrupted.processes()[name]["pid"], signal.SIGKILL)

    run_to_the_end(whole)
    run_to_the_end(interrupted, kill)
    assert "ppo died" in (interrupted.paths.logs / "run.log").read_text()
    assert course(interrupted) == course(whole)
    replayed = interrupted.rlhf("replay", "--config", str(interrupted.config), "--step", str(STEPS - 1))
    output, _ = replayed.communicate(timeout=120)
    assert replayed.returncode == 0, output
    assert "bit-identical" in output
