"""What a training run needs to go on exactly where it stopped: tensors in safetensors, the rest in JSON, no pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import ModelError
from rlhf.models.folders import read_json, recover_folder, replacing_folder, sha256_file, write_json
from rlhf.models.weights import verify_file

TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"


def save_training_state(folder: str | Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replaces the folder at once; durable on return.

    Args:
        tensors: any names; tensors that share memory are not allowed.
        state: anything JSON can hold.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old folder stays.
    """
    with replacing_folder(Path(folder)) as temporary:
        file = temporary / TENSORS_FILE
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        content = {"sha256": sha256_file(file), "size_bytes": file.stat().st_size, "state": state}
        write_json(temporary / STATE_FILE, content)


def load_training_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Raises:
        ModelError: a file is missing, cut short or altered.
    """
    folder = Path(folder)
    recover_folder(folder)
    content = read_json(folder / STATE_FILE)
    try:
        size_bytes, sha256, state = content["size_bytes"], content["sha256"], content["state"]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / STATE_FILE} is no training state") from error
    verify_file(folder / TENSORS_FILE, size_bytes, sha256)
    try:
        return load_file(folder / TENSORS_FILE), state
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / TENSORS_FILE} cannot be read: {error}") from error


def optimizer_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits an optimiser's state into tensors, "<parameter>/<entry>", and the groups' numbers.

    Args:
        names: one per parameter, in the order of the optimiser's groups.
    """
    content = optimizer.state_dict()
    tensors = {
        f"{names[index]}/{entry}": value
        for index, entries in content["state"].items()
        for entry, value in entries.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in content["param_groups"]]
    return tensors, {"names": list(names), "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """The inverse of `optimizer_state`; entries of `tensors` under other names are left alone.

    Raises:
        ModelError: the state is of other parameters or groups.
    """
    groups = optimizer.state_dict()["param_groups"]
    if state["names"] != list(names) or len(state["groups"]) != len(groups):
        raise ModelError("the optimiser's state is of another model or another grouping of its parameters")
    index_of = {name: index for index, name in enumerate(names)}
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name in index_of:
            entries.setdefault(index_of[name], {})[entry] = value
    merged = [{**group, **_as_tuples(saved)} for group, saved in zip(groups, state["groups"], strict=True)]
    optimizer.load_state_dict({"state": entries, "param_groups": merged})


def rng_state() -> dict[str, Tensor]:
    """Torch's global generators: "rng/cpu", and "rng/cuda:<n>" once CUDA is in use. uint8."""
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"rng/cuda:{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng_state(tensors: Mapping[str, Tensor]) -> None:
    """Other entries of `tensors` are left alone."""
    for name, state in tensors.items():
        if name == "rng/cpu":
            torch.set_rng_state(state)
        elif name.startswith("rng/cuda:"):
            torch.cuda.set_rng_state(state, int(name.removeprefix("rng/cuda:")))


def _as_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; Adam's betas are one."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
