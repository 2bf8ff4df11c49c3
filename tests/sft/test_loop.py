from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.errors import ModelError, SettingsError, StageFailed
from rlhf.sft import loop
from rlhf.sft.loop import Job, adamw, lr_factor, train
from rlhf.sft.settings import SftSettings
from rlhf.sft.tokens import TokenBatch

STEPS = 7


class Toy(nn.Module):
    """Dropout makes the global random state matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.dropout(self.embedding(ids))))


def toy_batch(index: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 10, (2, 6), generator=generator)
    # Fewer predicted tokens in every other batch.
    return TokenBatch(ids, torch.where(torch.arange(6) < 3 + 3 * (index % 2), ids.roll(-1, 1), -100))


def toy_job(tmp_path: Path, model: nn.Module | None = None, **changes: Any) -> Job[TokenBatch]:
    toy = Toy().train() if model is None else model

    def loss(batch: TokenBatch) -> torch.Tensor:
        return nn.functional.cross_entropy(toy(batch.input_ids).flatten(0, 1), batch.labels.flatten(), reduction="sum")

    settings = {"lr": 0.05, "checkpoint_every": 2, **changes}
    section = SftSettings(**settings)
    return Job(
        name="toy",
        model=toy,
        loss=loss,
        micro_batch=toy_batch,
        micro_batches=STEPS * section.gradient_accumulation,
        settings=section,
        state_folder=tmp_path / "out.training",
        tensorboard=tmp_path / "tensorboard",
        data={"data": "hash"},
    )


def interrupted_at(job: Job[TokenBatch], index: int, act: Callable[[], None]) -> Job[TokenBatch]:
    def micro_batch(asked: int) -> TokenBatch:
        if asked == index:
            act()
        return job.micro_batch(asked)

    return replace(job, micro_batch=micro_batch)


def crash() -> None:
    raise RuntimeError("killed")


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_continued_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = toy_job(tmp_path / "whole")
    trained = train(whole)
    with pytest.raises(RuntimeError, match="killed"):
        train(interrupted_at(toy_job(tmp_path), 5, crash))
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["4"]
    torch.manual_seed(1234)
    continued = toy_job(tmp_path)
    first_asked: list[int] = []
    watched = replace(continued, micro_batch=lambda index: first_asked.append(index) or toy_batch(index))
    resumed = train(watched)
    assert first_asked[0] == 4
    assert same_weights(whole.model, continued.model)
    assert not same_weights(whole.model, Toy())
    assert (resumed.steps, resumed.weight, resumed.loss) == (trained.steps, trained.weight, trained.loss)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signal_finishes_the_step_and_leaves_a_resumable_state(
    tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    whole = toy_job(tmp_path / "whole")
    train(whole)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        train(interrupted_at(toy_job(tmp_path), 4, lambda: os.kill(os.getpid(), number)))
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["5"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    continued = toy_job(tmp_path)
    train(continued)
    assert same_weights(whole.model, continued.model)


def test_second_signal_does_not_wait_for_the_step(tmp_path: Path) -> None:
    def twice() -> None:
        # Not os.kill: another thread may receive both before the first is handled, and then they are one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal was swallowed")

    with pytest.raises(KeyboardInterrupt):
        train(interrupted_at(toy_job(tmp_path), 3, twice))


def test_other_settings_or_data_start_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for changed in (toy_job(tmp_path, lr=0.01), replace(toy_job(tmp_path), data={"data": "other"})):
        with pytest.raises(RuntimeError):
            train(interrupted_at(toy_job(tmp_path), 5, crash))
        fresh = toy_job(tmp_path / "fresh", lr=changed.settings.lr)
        train(changed)
        train(fresh)
        assert same_weights(changed.model, fresh.model)
        assert "toy starts over" in caplog.text
        loop.remove_training_state(tmp_path / "fresh" / "out.training")
        loop.remove_training_state(tmp_path / "out.training")


def test_damaged_checkpoint_says_what_to_remove(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        train(interrupted_at(toy_job(tmp_path), 5, crash))
    (tmp_path / "out.training" / "4" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"cut short.*; remove .*out\.training to start toy over"):
        train(toy_job(tmp_path))


def test_accumulated_micro_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Weighted by tokens: the mean of the two batches' means would be another gradient."""
    gradients = []
    for accumulation in (2, 1):
        model = Toy().eval()
        job = toy_job(tmp_path, model, gradient_accumulation=accumulation, max_grad_norm=1e9)
        if accumulation == 1:
            two = [toy_batch(0), toy_batch(1)]
            joined = TokenBatch(torch.cat([b.input_ids for b in two]), torch.cat([b.labels for b in two]))
            job = replace(job, micro_batch=lambda _, joined=joined: joined)
        run = loop._Run(job)
        run._optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
        figures = run.advance()
        gradients.append((figures["loss"], [p.grad.clone() for p in model.parameters()]))
    (loss, accumulated), (expected_loss, expected) = gradients
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for ours, theirs in zip(accumulated, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    job = toy_job(tmp_path, max_grad_norm=1e-3)
    run = loop._Run(job)
    run._optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    assert run.advance()["grad_norm"] > 1e-3
    norm = torch.cat([p.grad.flatten() for p in job.model.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_weight_decay_is_on_matrices_only() -> None:
    model = Toy()
    optimizer, names = adamw(model, SftSettings(weight_decay=0.1))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names == ["embedding.weight", "head.weight", "norm.weight", "norm.bias", "head.bias"]
    assert len(decayed["params"]) == 2


def test_learning_rate_rises_then_falls() -> None:
    for schedule, middle, last in (("constant", 1.0, 1.0), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0245)):
        factors = [lr_factor(step, 20, 0.5, schedule) for step in range(20)]
        assert factors[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
        assert factors[10] == 1.0
        assert factors[15] == pytest.approx(middle)
        assert factors[19] == pytest.approx(last, abs=1e-3)
    assert lr_factor(0, 20, 0.0, "linear") == 1.0


def test_loss_that_is_not_finite_stops_with_a_sentence(tmp_path: Path) -> None:
    model = Toy()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(StageFailed, match=r"toy: loss nan .* at step 1; lower lr \(now 0.05\)"):
        train(toy_job(tmp_path, model))


def test_bfloat16_keeps_float32_weights_and_float16_is_refused(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    model = Toy().train()
    model.head.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    job = toy_job(tmp_path, model, dtype="bfloat16")
    train(job)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32}
    with pytest.raises(SettingsError, match="use bfloat16 or float32"):
        train(toy_job(tmp_path, dtype="float16"))


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(toy_job(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))
    assert {"loss", "lr", "grad_norm", "per_s"} == set(events.Tags()["scalars"])
