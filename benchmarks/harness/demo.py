"""PPO of the demo, on a policy that the demo's own stages made with fewer steps, and a reward model with a random head.

Both have the demo's shapes, and the policy's answers end in full stops, so a step costs what the demo's costs; nobody
asks here whether the policy improves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.bench import Options, say
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import load_tokenizer
from rlhf.settings.loader import load_settings
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings
from rlhf.supervisor.group import child_environment
from rlhf.supervisor.process import dying_with_parent, last_line

DEMO = Path(__file__).parents[2] / "services" / "rlhf" / "supervisor" / "demo.toml"
MODELS_RUN, PPO_RUN = "bench-models", "bench-ppo"
TIMEOUT_S = 900.0
LOOK_EVERY_S = 0.1


def demo_settings(options: Options, *, steps: int) -> Settings:
    """Of a PPO run of its own, on the models of `make_models`, that keeps every rollout in Redis until its end."""
    models = RunPaths(options.runs / MODELS_RUN)
    own = {
        **_sizes(options),
        "run.name": PPO_RUN,
        "run.stages": '["ppo"]',
        "run.min_judge_gain": "none",
        "run.model": models.pretrained,
        "reward.model": models.reward_model,
        "critic.model": models.reward_model,
        "ppo.prompts": models.prompts,
        "ppo.steps": steps,
        "ppo.checkpoint_every": 10**6,
        "ppo.sample_every": 10**6,
        # PPO alone is measured.
        "feedback.rounds": 0,
    }
    return load_settings(files=[DEMO], overrides=[f"{name}={value}" for name, value in own.items()])


def make_models(options: Options) -> None:
    """Texts, policy and reward model; what an earlier benchmark has left is done already."""
    own = {
        **_sizes(options),
        "run.name": MODELS_RUN,
        "run.stages": '["world", "pretrain"]',
        "run.min_judge_gain": "none",
    }
    say("  making the models")
    command = rlhf_run(DEMO, *_set(own))
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=child_environment(os.environ))
    if done.returncode != 0:
        raise RuntimeError(f"the demo's models could not be made: {done.stdout[-500:]}{done.stderr[-500:]}")
    paths = RunPaths(options.runs / MODELS_RUN)
    RewardModel.new(paths.pretrained, seed=0).save(paths.reward_model, load_tokenizer(paths.pretrained))


def run_ppo(settings: Settings, watch: Callable[[dict[str, int]], None]) -> list[dict[str, float]]:
    """`rlhf run` from nothing to its end; `watch` is called about ten times a second with the process ids by name.
    Returns the steps' metrics."""
    paths = settings.paths
    shutil.rmtree(paths.folder, ignore_errors=True)
    paths.folder.mkdir(parents=True)
    config = paths.folder / "config.json"
    config.write_text(settings.model_dump_json())
    log = paths.folder / "bench.log"
    with log.open("w") as output:
        running = subprocess.Popen(
            rlhf_run(config), stdout=output, stderr=subprocess.STDOUT, env=child_environment(os.environ)
        )
        try:
            deadline_s = time.monotonic() + TIMEOUT_S
            while running.poll() is None:
                watch({"run": running.pid, **_processes(paths)})
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"PPO took longer than {TIMEOUT_S:.0f} s")
                time.sleep(LOOK_EVERY_S)
        finally:
            running.terminate()
            running.wait(30)
    if running.returncode != 0:
        raise RuntimeError(f"PPO failed: {last_line(log)}")
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


def _processes(paths: RunPaths) -> dict[str, int]:
    if not paths.processes.exists():
        return {}
    return {one["name"]: one["pid"] for one in json.loads(paths.processes.read_text()) if one["pid"] is not None}


def rlhf_run(config: Path, *options: str) -> list[str]:
    """A supervisor that ends with this process, however that ends, and its processes with it."""
    command = [sys.executable, "-m", "rlhf.cli.main", "run", str(config), *options]
    return dying_with_parent(command, signal.SIGTERM)


def _sizes(options: Options) -> dict[str, Any]:
    full = {
        "run.folder": options.runs,
        "world.texts": 6000,
        "pretrain.steps": 300,
    }
    tiny = {
        "world.texts": 400,
        "world.prompts": 100,
        "pretrain.vocab_size": 400,
        "pretrain.hidden_size": 16,
        "pretrain.layers": 1,
        "pretrain.heads": 2,
        "pretrain.steps": 5,
        "ppo.batch_prompts": 8,
        "ppo.epochs": 1,
    }
    return full | tiny if options.quick else full


def _set(values: Mapping[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
