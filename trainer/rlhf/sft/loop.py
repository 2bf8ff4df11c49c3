"""The one training loop behind pretraining, fine-tuning and the reward model.

A run is a pure function of its settings and data: micro-batch `i` is computed from `i`, the learning rate from the
step, so weights, optimiser and random state are all there is to a checkpoint, and an interrupted run that continues
ends with the same bits as one that was left alone.

    <out>.training/<step>/   the newest checkpoint; the folder is removed once <out> is complete
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from rlhf.errors import ModelError, SettingsError, StageFailed
from rlhf.models.folders import storage_errors
from rlhf.models.training_state import (
    load_optimizer_state,
    load_training_state,
    optimizer_state,
    restore_rng_state,
    rng_state,
    save_training_state,
)
from rlhf.models.weights import copy_tensors, learning_weights
from rlhf.observe.progress import progress
from rlhf.settings import Compute, Optimisation

logger = logging.getLogger(__name__)


class MicroBatch(Protocol):
    """What one forward and backward pass takes."""

    @property
    def weight(self) -> float:
        """What the loss is a sum over: predicted tokens, or rankings. Batches of a step are averaged by it."""

    def to(self, device: torch.device) -> Self: ...


Batch = TypeVar("Batch", bound=MicroBatch)


@dataclass(frozen=True)
class Job(Generic[Batch]):
    """One training run."""

    name: str
    """Of the command, for progress and logs."""
    model: nn.Module
    """Float32 weights, already on its device; in whatever mode it is to be trained in."""
    loss: Callable[[Batch], Tensor]
    """Sum of the losses of a micro-batch, a scalar in float32."""
    micro_batch: Callable[[int], Batch]
    """Micro-batch number i of the run."""
    micro_batches: int
    """Of the whole run, all epochs."""
    settings: Any
    """A section that is both `Compute` and `Optimisation`, with a `seed`."""
    state_folder: Path
    """Where checkpoints go: `<out>.training`."""
    tensorboard: Path
    """Folder of this run's TensorBoard events."""
    data: Mapping[str, str]
    """Hashes of what is trained on. A checkpoint of other data, or of other settings, is not continued."""

    @property
    def steps(self) -> int:
        accumulation: int = self.settings.gradient_accumulation
        return math.ceil(self.micro_batches / accumulation)


@dataclass(frozen=True)
class Trained:
    """What a run measured."""

    steps: int
    loss: float
    """Mean over the last tenth of the steps."""
    weight: float
    """Tokens (or rankings) trained on."""
    seconds: float
    """In the loop, over all its interruptions."""


def train(job: Job[Any]) -> Trained:
    """Trains `job.model` in place, from the newest checkpoint where there is one.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the step under way was finished and saved. SIGTERM: SystemExit.
        SettingsError: float16, which would need loss scaling.
        StageFailed: a loss or gradient is not finite.
        StorageError: a checkpoint could not be written.
    """
    run = _Run(job)
    run.resume()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(job.name, total=job.steps, unit="steps"))
        scalars = stack.enter_context(_scalars(job.tensorboard, run.step))
        stop = stack.enter_context(stop_signals())
        bar.advance(run.step)
        while run.step < job.steps:
            figures = run.advance()
            scalars(figures, run.step)
            bar.advance(1, loss=figures["loss"], lr=figures["lr"])
            if stop:
                run.save()
                raise stop[0]
            if run.step % job.settings.checkpoint_every == 0 and run.step < job.steps:
                run.save()
    return run.result()


def autocast(settings: Compute) -> torch.autocast:
    """Mixed precision for `dtype = "bfloat16"`: weights and optimiser stay float32.

    Raises:
        SettingsError: float16.
    """
    if settings.dtype == "float16":
        raise SettingsError("dtype: training in float16 would need loss scaling; use bfloat16 or float32")
    device_type = torch.device(settings.device).type
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16")


def lr_factor(step: int, steps: int, warmup_fraction: float, schedule: str) -> float:
    """Share of the peak learning rate at optimiser step `step` of `steps`, from 0: a linear rise, then the schedule."""
    warmup = math.ceil(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


def adamw(model: nn.Module, settings: Optimisation) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW that decays matrices only (not biases or norms), and its parameters' names in its order."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in named if parameter.ndim >= 2]
    others = [(name, parameter) for name, parameter in named if parameter.ndim < 2]
    groups = [
        {"params": [parameter for _, parameter in decayed], "weight_decay": settings.weight_decay},
        {"params": [parameter for _, parameter in others], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.adam_beta2), fused=True)
    return optimizer, [name for name, _ in decayed + others]


def state_folder_of(out: Path) -> Path:
    """Where the checkpoints of a stage that writes `out` lie."""
    return out.with_name(f"{out.name}.training")


def remove_training_state(state_folder: Path) -> None:
    """Once the stage's result is complete."""
    shutil.rmtree(state_folder, ignore_errors=True)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[BaseException]]:
    """Inside, the first SIGINT or SIGTERM only fills the list with what to raise; the next one acts as usual."""
    asked: list[BaseException] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        asked.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """A job and how far it has come."""

    def __init__(self, job: Job[Any]) -> None:
        self.job = job
        self.step = 0
        self._seconds = 0.0
        self._weight = 0.0
        self._losses: list[float] = []
        self._device = next(job.model.parameters()).device
        self._autocast = autocast(job.settings)
        self._optimizer, self._names = adamw(job.model, job.settings)
        self._identity = _identity(job)
        # Dropout draws from the global generator.
        torch.manual_seed(job.settings.seed)

    def advance(self) -> dict[str, float]:
        """One optimiser step over its micro-batches; the loss is that of one large batch."""
        started_s, settings = time.monotonic(), self.job.settings
        first = self.step * settings.gradient_accumulation
        last = min(first + settings.gradient_accumulation, self.job.micro_batches)
        batches = [self.job.micro_batch(index).to(self._device) for index in range(first, last)]
        weight = sum(batch.weight for batch in batches)
        loss = sum(self._backward(batch, weight) for batch in batches)
        norm = float(nn.utils.clip_grad_norm_(self.job.model.parameters(), settings.max_grad_norm))
        self._check_finite(loss, norm)
        lr = settings.lr * lr_factor(self.step, self.job.steps, settings.warmup_fraction, settings.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.monotonic() - started_s
        self._seconds += seconds
        self._weight += weight
        self._losses.append(loss)
        return {"loss": loss, "lr": lr, "grad_norm": norm, "per_s": weight / seconds}

    def result(self) -> Trained:
        tail = self._losses[-max(1, self.job.steps // 10) :]
        return Trained(self.step, sum(tail) / max(1, len(tail)), self._weight, self._seconds)

    def save(self) -> None:
        """Writes the checkpoint of this step, then removes the one before."""
        tensors, optimizer = optimizer_state(self._optimizer, self._optimizer_names)
        tensors |= {f"model/{name}": tensor for name, tensor in learning_weights(self.job.model).items()} | rng_state()
        state = {
            "identity": self._identity,
            "step": self.step,
            "seconds": self._seconds,
            "weight": self._weight,
            "losses": self._losses[-max(1, self.job.steps // 10) :],
            "optimizer": optimizer,
        }
        older = _checkpoints(self.job.state_folder)
        save_training_state(self.job.state_folder / str(self.step), tensors, state)
        with storage_errors(self.job.state_folder):
            for folder in older:
                if folder.name != str(self.step):
                    shutil.rmtree(folder)

    def resume(self) -> None:
        """Continues from the newest checkpoint. One of other settings or data is removed, and the run starts over."""
        found = _checkpoints(self.job.state_folder)
        if not found:
            return
        try:
            tensors, state = load_training_state(found[-1])
        except ModelError as error:
            raise ModelError(f"{error}; remove {self.job.state_folder} to start {self.job.name} over") from error
        if state["identity"] != self._identity:
            logger.warning("%s starts over: settings or data have changed since it was interrupted", self.job.name)
            remove_training_state(self.job.state_folder)
            return
        weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        copy_tensors(learning_weights(self.job.model), weights)
        load_optimizer_state(self._optimizer, self._optimizer_names, tensors, state["optimizer"])
        restore_rng_state(tensors)
        self.step, self._losses = int(state["step"]), list(state["losses"])
        self._seconds, self._weight = float(state["seconds"]), float(state["weight"])
        logger.info("%s continues from step %d of %d", self.job.name, self.step, self.job.steps)

    @property
    def _optimizer_names(self) -> list[str]:
        """Apart from the weights of the same names in one file."""
        return [f"optimizer/{name}" for name in self._names]

    def _backward(self, batch: MicroBatch, weight: float) -> float:
        with self._autocast:
            loss = self.job.loss(batch) / weight
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _check_finite(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StageFailed(
                f"{self.job.name}: loss {loss} and gradient norm {norm} at step {self.step + 1}; "
                f"lower lr (now {self.job.settings.lr}) and run it again"
            )


def _identity(job: Job[Any]) -> str:
    """Hash of data and settings, without those that change no number of the run."""
    settings = job.settings.model_dump(mode="json", exclude={"out", "threads", "checkpoint_every"})
    content = {"settings": settings, "data": dict(job.data), "micro_batches": job.micro_batches}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checkpoints(state_folder: Path) -> list[Path]:
    """Complete ones, oldest first."""
    if not state_folder.is_dir():
        return []
    return sorted((path for path in state_folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


@contextlib.contextmanager
def _scalars(folder: Path, step: int) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """TensorBoard; what an interrupted run wrote beyond its checkpoint is dropped."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(figures: Mapping[str, float], at_step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, at_step)

    try:
        yield write
    finally:
        writer.close()
