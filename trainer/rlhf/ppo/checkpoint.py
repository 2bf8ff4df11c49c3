"""Checkpoints: weights, optimisers, random state, KL coefficient, prompt cursor and ledger, in one folder that appears
complete or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import ModelError
from rlhf.models.folders import read_json
from rlhf.models.training_state import (
    STATE_FILE,
    load_optimizer_state,
    load_training_state,
    optimizer_state,
    save_training_state,
)
from rlhf.models.weights import adapter_of, copy_weights, named_weights
from rlhf.ppo.ledger import Ledger
from rlhf.ppo.step import PpoStep

GENERATOR = "generator"
NAME = re.compile(r"\d+-\d+")


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first. A folder is named <number>-<step>; numbers rise, so that none is ever replaced.

    A kill in the middle of replacing one could leave neither, after the rollouts of both were acknowledged.
    """
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_number)


def save_checkpoint(folder: Path, step: PpoStep, ledger: Ledger, keep: int) -> Path:
    """Durable on return; then removes all but the newest `keep`, and those of a step that has a newer one.

    Raises:
        StorageError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    tensors, state = capture(step)
    number = max((_number(path) for path in checkpoints(folder)), default=-1) + 1
    target = folder / f"{number}-{ledger.trained_steps}"
    save_training_state(target, tensors, {"ledger": ledger.to_json(), **state})
    for old in _superseded(checkpoints(folder), keep):
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, step: PpoStep) -> dict[str, Any]:
    """Restores everything but the ledger, whose state is returned: it goes on in an epoch that the caller knows.

    Raises:
        ModelError: the checkpoint is altered, or of a model of another shape.
    """
    tensors, state = load_training_state(path)
    restore(step, tensors, state)
    ledger: dict[str, Any] = state["ledger"]
    return ledger


def capture(step: PpoStep) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All of it that training changes: tensors, which are its own and not copies, and the rest as JSON values."""
    tensors: dict[str, Tensor] = {GENERATOR: step.generator.get_state()}
    for name, module in step.learner.modules().items():
        tensors |= {f"{name}/{key}": value for key, value in named_weights(module).items()}
    optimizers: dict[str, Any] = {}
    for name, optimizer in step.learner.optimizers.items():
        state_tensors, optimizers[name] = optimizer_state(optimizer, list(_parameter_names(name, optimizer)))
        tensors |= state_tensors
    adapter = adapter_of(step.learner.policy)
    return tensors, {
        "kl_coef": step.kl.coef,
        "optimizers": optimizers,
        "adapter": None if adapter is None else asdict(adapter),
    }


def restore(step: PpoStep, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """The inverse of `capture`. The tensors become its optimisers' own.

    Raises:
        ModelError: the state is of a model of another shape, or of an adapter for another.
    """
    _check_adapter(step, state.get("adapter"))
    for name, module in step.learner.modules().items():
        prefix = f"{name}/"
        copy_weights(module, {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    for name, optimizer in step.learner.optimizers.items():
        names = list(_parameter_names(name, optimizer))
        load_optimizer_state(optimizer, names, tensors, state["optimizers"][name])
    step.generator.set_state(tensors[GENERATOR])
    step.kl.coef = state["kl_coef"]


def _check_adapter(step: PpoStep, saved: Mapping[str, Any] | None) -> None:
    adapter = adapter_of(step.learner.policy)
    own = None if adapter is None else asdict(adapter)
    if own != saved:
        raise ModelError(
            f"the saved state is of {_told(saved)}, and the settings ask for {_told(own)}; go on with the settings and "
            "the model that the run began with, or begin another run"
        )


def _told(adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return "a whole policy (lora.rank = 0)"
    return f"an adapter on the model {adapter['base_sha256'][:12]} that counts {adapter['scaling']:g} times"


def read_ledger(path: Path) -> dict[str, Any]:
    """The ledger in a checkpoint, without its tensors."""
    ledger: dict[str, Any] = read_json(path / STATE_FILE)["state"]["ledger"]
    return ledger


def checkpoint_versions(folder: Path) -> list[tuple[int, int]]:
    """(epoch, step) of the weights in each checkpoint."""
    ledgers = [read_ledger(path) for path in checkpoints(folder)]
    return [(ledger["epoch"], ledger["trained_steps"]) for ledger in ledgers]


def _superseded(saved: list[Path], keep: int) -> list[Path]:
    newest = {path.name.split("-")[1]: path for path in saved}
    kept = sorted(newest.values(), key=_number)[-keep:]
    return [path for path in saved if path not in kept]


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])


def _parameter_names(name: str, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """By position: an optimiser's parameters always come in the order of the modules'."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return (f"adam.{name}.{index}" for index in range(count))
