from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf.errors import ModelError
from rlhf.models.training_state import (
    load_optimizer_state,
    load_training_state,
    optimizer_state,
    restore_rng_state,
    rng_state,
    save_training_state,
)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


def model_and_optimizer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))


def test_optimiser_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.05
    tensors, state = optimizer_state(optimizer, ["weight", "bias"])
    save_training_state(tmp_path / "s", {**tensors, **model.state_dict()}, state)

    resumed, its_optimizer = model_and_optimizer()
    tensors, state = load_training_state(tmp_path / "s")
    resumed.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
    load_optimizer_state(its_optimizer, ["weight", "bias"], tensors, state)
    assert its_optimizer.param_groups[0]["lr"] == 0.05
    assert its_optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    step(model, optimizer)
    step(resumed, its_optimizer)
    assert torch.equal(model.weight, resumed.weight)
    assert torch.equal(model.bias, resumed.bias)


def test_state_of_another_model_is_refused() -> None:
    _, optimizer = model_and_optimizer()
    tensors, state = optimizer_state(optimizer, ["weight", "bias"])
    with pytest.raises(ModelError, match="another model or another grouping"):
        load_optimizer_state(optimizer, ["weight", "other"], tensors, state)


def test_altered_cut_or_missing_state_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    save_training_state(folder, {"a": torch.arange(4.0)}, {"step": 3})
    tensors, state = load_training_state(folder)
    assert torch.equal(tensors["a"], torch.arange(4.0))
    assert state == {"step": 3}
    file = folder / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="was altered"):
        load_training_state(folder)
    file.write_bytes(data[:-1])
    with pytest.raises(ModelError, match="cut short"):
        load_training_state(folder)
    (folder / "state.json").write_text(json.dumps({"state": {}}))
    with pytest.raises(ModelError, match="is no training state"):
        load_training_state(folder)
    with pytest.raises(ModelError, match="is missing"):
        load_training_state(tmp_path / "absent")


def test_random_numbers_go_on(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    save_training_state(tmp_path / "s", rng_state(), {})
    expected = torch.rand(5)
    torch.manual_seed(99)
    restore_rng_state(load_training_state(tmp_path / "s")[0])
    assert torch.equal(torch.rand(5), expected)
