"""The trainer with an adapter: what must be exact, what must not move, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.errors import ModelError, SettingsError
from rlhf.models.adapters import add_adapter
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.weights import WEIGHTS_FILE, AdapterOf, named_weights, published_sha256, read_manifest
from rlhf.ppo import loop, replay
from rlhf.ppo.checkpoint import capture, checkpoints, restore
from rlhf.ppo.history import History
from rlhf.ppo.settings import CriticSettings, LoraSettings
from rlhf.ppo.step import PpoStep
from rlhf.queues.connection import connect
from rlhf.settings.run import Settings
from rlhf.wire.records import Rollout
from support.answering import AnsweringWorker
from support.rollouts import sampled_rollouts
from support.steps import ALONE, tiny_step
from support.tiny import tiny_lm, tiny_lm_folder, tiny_reward_folder

BASE = "ab" * 32
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9]]


def lora_step(*, architecture: str = "llama", dropout: float = 0.0, base: str = BASE, **settings: Any) -> PpoStep:
    step = tiny_step(policy=_adapted(architecture, base), **{"lr": 1e-2, **settings})
    if dropout:
        for module in step.learner.policy.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(dropout).eval()
    return step


def _adapted(architecture: str, base: str) -> Any:
    policy = tiny_lm(architecture)
    # With a dropout of peft's layers in name only; `lora_step` sets what it is.
    add_adapter(policy, LoraSettings(rank=4, alpha=8, target_modules="all-linear"), base, seed=0)
    return policy


def some_rollouts(step: PpoStep, completions: int = 1) -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)
    policy = step.learner.policy
    prompts = [prompt for prompt in PROMPTS for _ in range(completions)]
    return sampled_rollouts(
        policy, policy, prompts, lambda response: float(len(set(response))), new_tokens=6, generator=generator
    )


def base_of(step: PpoStep) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in step.learner.policy.named_parameters() if ".lora_" not in n}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_first_ratio_is_one_and_the_base_stays_bit_for_bit(architecture: str, critic: Any) -> None:
    step = lora_step(architecture=architecture, critic=CriticSettings(kind=critic, lr=1e-3), minibatches=2)
    before, adapter = base_of(step), published_sha256(step.learner.policy)
    for _ in range(2):
        figures = step(some_rollouts(step))
        assert figures.first_ratio_error == 0.0
        assert figures.policy_grad_norm > 0
    assert published_sha256(step.learner.policy) != adapter
    after = base_of(step)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    held = {id(p) for group in step.learner.optimizers["policy"].param_groups for p in group["params"]}
    learning = {id(p) for p in step.learner.policy.parameters() if p.requires_grad}
    if critic == "shared":
        learning |= {id(p) for p in step.learner.value_head.parameters()}
    assert held == learning


@pytest.mark.parametrize("estimator", ["a2c", "reinforce++"])
def test_other_estimators(estimator: str) -> None:
    step = lora_step(estimator=estimator, **ALONE[estimator])
    assert step(some_rollouts(step)).first_ratio_error == 0.0


def test_checkpointed_activations_change_not_a_bit() -> None:
    ends, forwards = {}, {}
    for checkpointing in (False, True):
        step = lora_step(gradient_checkpointing=checkpointing)
        rollouts, count = some_rollouts(step), list[int]()
        layer = step.learner.policy.base_model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda *_, c=count: c.append(1))
        assert step(rollouts).first_ratio_error == 0.0
        ends[checkpointing], forwards[checkpointing] = published_sha256(step.learner.policy), len(count)
    assert ends[True] == ends[False]
    assert forwards == {False: 3, True: 5}


def test_bfloat16_learns_too() -> None:
    step = lora_step(dtype="bfloat16")
    rollouts = some_rollouts(step)
    figures = step(rollouts)
    assert figures.first_ratio_error == 0.0
    assert figures.policy_grad_norm > 0
    assert all(tensor.dtype == torch.float32 for tensor in named_weights(step.learner.policy).values())
    assert step(rollouts).approx_kl > figures.approx_kl / 10


def test_dropout_acts_in_updates_alone_and_repeats_itself() -> None:
    ends = []
    for _ in range(2):
        step = lora_step(dropout=0.5)
        rollouts = some_rollouts(step)
        step.learner.begin_step(0)
        step(rollouts)
        step.learner.begin_step(1)
        again = step(rollouts)
        assert again.first_ratio_error > 0
        ends.append(published_sha256(step.learner.policy))
        assert not any(module.training for module in step.learner.policy.modules())
    assert ends[0] == ends[1]
    without = lora_step()
    without(rollouts), without(rollouts)
    assert published_sha256(without.learner.policy) != ends[0]


def test_a_state_holds_the_adapter_alone_and_goes_on_with_its_own_only() -> None:
    step = lora_step()
    rollouts = some_rollouts(step)
    step(rollouts)
    tensors, rest = capture(step)
    of_policy = [name for name in tensors if name.startswith("policy/")]
    assert len(of_policy) == 28
    assert all(".lora_" in name for name in of_policy)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    rest = json.loads(json.dumps(rest))
    step(rollouts)
    resumed = lora_step()
    restore(resumed, copies, rest)
    resumed(rollouts)
    assert published_sha256(resumed.learner.policy) == published_sha256(step.learner.policy)
    with pytest.raises(ModelError, match=r"adapter on the model abababababab.*adapter on the model cdcdcdcdcdcd"):
        restore(lora_step(base="cd" * 32), copies, rest)
    with pytest.raises(ModelError, match=r"a whole policy \(lora\.rank = 0\)"):
        restore(tiny_step(), copies, rest)
    with pytest.raises(ModelError, match=r"state is of a whole policy"):
        restore(lora_step(), *capture(tiny_step()))


@pytest.fixture
def settings(tmp_path: Path, run_name: str, redis_settings: Any) -> Settings:
    made = Settings.model_validate(
        {
            "run": {"name": run_name, "folder": tmp_path},
            "redis": redis_settings.model_dump(),
            "ppo": {
                "steps": 4,
                "batch_prompts": 4,
                "epochs": 2,
                "checkpoint_every": 2,
                "snapshot_every": 2,
                "rollout_timeout_s": 20.0,
                "lr": 1e-2,
                "threads": 1,
            },
            "lora": {"rank": 2, "dropout": 0.1},
            "sampling": {"max_new_tokens": 8},
        }
    )
    tiny_lm_folder(made.paths.pretrained)
    tiny_reward_folder(made.paths.reward_model)
    made.paths.prompts.parent.mkdir(parents=True)
    made.paths.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("A fine", "The plot")))
    return made


@pytest.fixture
def worker(settings: Settings) -> Iterator[None]:
    answering = AnsweringWorker(connect(settings), settings.run.name, settings.redis, lambda task: None)
    answering.start()
    yield
    answering.stop()


def changed(settings: Settings, section: str, **values: Any) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


@pytest.mark.usefixtures("worker")
def test_a_run_leaves_small_weights_a_whole_policy_and_its_adapter(settings: Settings) -> None:
    loop.run(changed(settings, "ppo", steps=2))
    loop.run(settings)  # goes on from a checkpoint
    paths = settings.paths
    manifest = read_manifest(paths.weights / "1-4")
    assert manifest.adapter == AdapterOf(weights_sha256(paths.pretrained), 8.0)
    # Queries and values of two layers, each with an A and a B.
    assert len(load_file(paths.weights / "1-4" / WEIGHTS_FILE)) == 8
    assert manifest.size_bytes < (paths.pretrained / WEIGHTS_FILE).stat().st_size / 5
    saved = load_file(checkpoints(paths.checkpoints)[-1] / "tensors.safetensors")
    assert sum(name.startswith("policy/") for name in saved) == 8

    trained, start = named_weights(load_causal_lm(paths.policy)), named_weights(load_causal_lm(paths.pretrained))
    moved = {name for name in start if not trained[name].equal(start[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "v_proj"}
    assert (paths.policy / "adapter" / "adapter_config.json").is_file()
    newest = named_weights(load_causal_lm(paths.snapshots / "4"))
    assert all(newest[name].equal(trained[name]) for name in trained)

    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert not any(found["name"] == "first_ratio" for row in rows for found in row["diagnoses"])
    for step in (1, 4):
        assert replay.run(changed(settings, "replay", step=step))["identical"]
    with pytest.raises(SettingsError, match=r"lora\.rank=4: this was used up"):
        replay.run(settings, ["lora.rank=4"])


@pytest.mark.usefixtures("worker")
def test_a_run_does_not_go_on_with_another_adapter_or_none(settings: Settings) -> None:
    loop.run(changed(settings, "ppo", steps=2))
    for lora in ({"alpha": 3}, {"rank": 0}):
        with pytest.raises(ModelError, match="go on with the settings"):
            loop.run(changed(settings, "lora", **lora))
    assert len(History(settings.paths.history).steps()) == 2
