"""`rlhf replay`: one optimisation step of a run computed again, as it was and as it would have been.

    checkpoint, or the run's start ─▶ the steps between ─▶ before step N ─┬─▶ step N as it was      = what was recorded?
                                                                          └─▶ step N with --set …   what would differ

Nothing runs beside it: rollouts come from the run's history. With other settings the rollouts are still those that the
run sampled, which for one step is right, because they were sampled before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from rlhf.errors import DataError, RequestError, SettingsError, StageFailed
from rlhf.models.compute import about_machine, set_deterministic, set_threads
from rlhf.models.folders import start_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.weights import published_sha256
from rlhf.ppo.checkpoint import capture, checkpoints, load_checkpoint, read_ledger, restore
from rlhf.ppo.history import History, TrainedStep
from rlhf.ppo.intake import blobs_of
from rlhf.ppo.reference_layer import load_reference
from rlhf.ppo.replay_report import compared, differences, ranges, show
from rlhf.ppo.rescore import rescored
from rlhf.ppo.settings import LoraSettings
from rlhf.ppo.setup import build_step
from rlhf.ppo.step import PpoStep
from rlhf.settings.loader import with_overrides
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings
from rlhf.wire.blobs import read_blob
from rlhf.wire.records import Rollout

OF_THE_STEP = ("ppo", "lora", "critic", "kl", "shaping", "sampling")
"""Sections that say how a step is made. Others given with --set say where things are."""
OF_THE_START = frozenset(
    (
        "ppo.model",
        "ppo.seed",
        "ppo.prompts",
        "critic.kind",
        "critic.init_from",
        "critic.model",
        "sampling.max_new_tokens",
        *(f"lora.{name}" for name in LoraSettings.model_fields),
    )
)
"""Settings that were used up before the first step, or before the rollouts came."""

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Start:
    """Where the computation begins."""

    step: int
    """Steps behind it."""
    checkpoint: Path | None
    """None: the models that the run started from."""

    def __str__(self) -> str:
        return "the run's start" if self.checkpoint is None else f"checkpoint {self.checkpoint.name}"


@dataclass(frozen=True)
class Before:
    """All that training changes, as it was before a step: tensors of its own, and the rest."""

    tensors: Mapping[str, Tensor]
    rest: Mapping[str, Any]

    @classmethod
    def of(cls, step: PpoStep) -> Before:
        tensors, rest = capture(step)
        return cls({name: tensor.detach().clone() for name, tensor in tensors.items()}, rest)


@dataclass(frozen=True)
class Outcome:
    """What a step came to."""

    figures: Figures
    weights_sha256: str
    change: Mapping[str, Tensor]
    """Of each of the policy's tensors: after the step minus before."""


def run(settings: Settings, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """
    Args:
        overrides: `section.field=value` each, of what is to be different in the step.

    Raises:
        DataError: the step was not made, or is not kept, or nothing is kept to begin at; says which steps can be had.
        SettingsError: a setting that is to be different decides nothing about a step.
        StageFailed: the step came out different from what the run recorded.
    """
    paths, replay = settings.paths, settings.replay
    history = History(paths.history)
    number, start = find(paths, history, replay.step)
    trained = history.read(number)
    changes = _changes(settings, overrides)
    recorded_settings = settings_then(trained, settings)
    what_if = with_overrides(recorded_settings, [c for c in changes if not c.startswith("replay.")])

    print(f"step {number} of {settings.run.name}: {len(trained.rollouts)} rollouts, in epoch {trained.epoch}")
    _as_on_the_machine(trained)
    before, strayed = state_before(settings, history, start, number)
    as_it_was = outcome(recorded_settings, before, trained)
    recorded = recorded_figures(paths.metrics, number)
    different = differences({**recorded, "weights": trained.weights_after}, _row(as_it_was))
    columns = {"recorded": {**recorded, "weights": trained.weights_after}, "computed again": _row(as_it_was)}
    found: dict[str, Any] = {"step": number, "identical": not different and strayed is None, "figures": columns}
    if changes:
        other = _with_changes(what_if, before, trained, changes, settings)
        columns[f"with {', '.join(changes)}"] = _row(other)
        found |= compared(as_it_was.change, other.change)
    show(columns)
    _tell(found, start, number, different, strayed, trained)
    return found


def find(paths: RunPaths, history: History, wanted: int) -> tuple[int, Start]:
    """The step to compute, and where to begin.

    Args:
        wanted: 0: the newest that can be had.

    Raises:
        DataError: it cannot be had.
    """
    kept = history.steps()
    if not kept:
        raise DataError(
            "no rollouts are kept there, so no step can be computed again; `rlhf ppo` keeps them unless "
            "ppo.keep_rollouts_mib is 0",
            path=history.folder,
        )
    saved = {read_ledger(path)["trained_steps"]: path for path in checkpoints(paths.checkpoints)}
    starts = [Start(0, None), *(Start(step, path) for step, path in sorted(saved.items()) if step > 0)]
    best = {step: start for step in kept if (start := _nearest(starts, set(kept), step)) is not None}
    number = wanted or max(best, default=kept[-1])
    if number in best:
        return number, best[number]
    if number > kept[-1]:
        raise DataError(f"step {number}: the run has made {kept[-1]} steps", path=history.folder)
    can = f"these can be computed again: {ranges(list(best))}" if best else "no step can be computed again"
    if number not in kept:
        raise DataError(
            f"step {number}: its rollouts are no longer kept; {can}. A larger ppo.keep_rollouts_mib keeps more",
            path=history.folder,
        )
    raise DataError(
        f"step {number}: no checkpoint before it is left from which all rollouts up to it are kept; {can}. A larger "
        "ppo.keep_checkpoints, or a smaller ppo.checkpoint_every, leaves more",
        path=paths.checkpoints,
    )


def settings_then(trained: TrainedStep, here: Settings) -> Settings:
    """Those that the step was made with, in the run's folder as it is now.

    Raises:
        DataError: they are of another version of this software.
    """
    try:
        then = Settings.model_validate(trained.settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"step {trained.step} was made with settings that this version does not know "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}); take the version that made it"
        ) from error
    place = then.run.model_copy(update={"name": here.run.name, "folder": here.run.folder})
    return then.model_copy(update={"run": place})


def state_before(here: Settings, history: History, start: Start, number: int) -> tuple[Before, int | None]:
    """From the start through the steps between; and the first of them that came out with other weights than recorded.

    Raises:
        DataError: the models that the run started from are others by now, or a file of the history is damaged.
    """
    step: PpoStep | None = None
    then: Settings | None = None
    strayed: int | None = None
    for between in range(start.step + 1, number + 1):
        trained = history.read(between)
        settings = settings_then(trained, here)
        if step is None:
            step = _begun(settings, start, trained)
        elif settings != then:  # the run was interrupted, and went on with others
            step = built(settings, Before.of(step))
        then = settings
        if between < number:
            _train(step, trained)
            if strayed is None and published_sha256(step.learner.policy) != trained.weights_after:
                strayed = between
    assert step is not None
    return Before.of(step), strayed


def built(settings: Settings, before: Before) -> PpoStep:
    """A step of these settings in that state.

    Raises:
        ModelError: the state is of a model of another shape.
    """
    step = _built(settings)
    # Copies, because an optimiser takes what it is given for its own, and training changes it in place.
    restore(step, {name: tensor.clone() for name, tensor in before.tensors.items()}, before.rest)
    return step


def outcome(settings: Settings, before: Before, trained: TrainedStep, *, kl_coef: float | None = None) -> Outcome:
    """The step made under these settings.

    Args:
        kl_coef: in place of that of the state.
    """
    step = built(settings, before)
    if kl_coef is not None:
        step.kl.coef = kl_coef
    figures = _train(step, trained)
    after, _ = capture(step)
    change = {name: after[name] - before.tensors[name] for name in after if name.startswith("policy/")}
    return Outcome(figures, published_sha256(step.learner.policy), change)


def recorded_figures(path: Path, number: int) -> dict[str, float | None]:
    """The step's row of metrics.jsonl.

    Raises:
        DataError: it has none.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in reversed(lines):
        row: dict[str, Any] = json.loads(line)
        if row.get("step") == number:
            return row
    raise DataError(f"there is no row of step {number}, so there is nothing to compare it with", path=path)


def _nearest(starts: Sequence[Start], kept: set[int], number: int) -> Start | None:
    """The last before the step from which every rollout is kept."""
    before = [start for start in starts if start.step < number]
    possible = [start for start in before if kept.issuperset(range(start.step + 1, number + 1))]
    return possible[-1] if possible else None


def _changes(settings: Settings, overrides: Sequence[str]) -> list[str]:
    """What is to be different in the step.

    Raises:
        SettingsError: it decides nothing about a step.
    """
    changes = [text.replace(" ", "") for text in overrides if text.strip().partition(".")[0] in OF_THE_STEP]
    for change in changes:
        if change.partition("=")[0] in OF_THE_START:
            raise SettingsError(
                f"--set {change}: this was used up before the step, so another value changes nothing about it; start a "
                "run of its own with it"
            )
    replay = settings.replay
    if replay.reward_model is not None and replay.reward_rule:
        raise SettingsError("replay.reward_model and replay.reward_rule are both set; one of them gives the scores")
    if replay.reward_model is not None:
        changes.append(f"replay.reward_model={replay.reward_model}")
    if replay.reward_rule:
        changes.append(f"replay.reward_rule={replay.reward_rule}")
    return changes


def _with_changes(
    what_if: Settings, before: Before, trained: TrainedStep, changes: Sequence[str], here: Settings
) -> Outcome:
    # The coefficient is part of the state, because a controller may have moved it.
    kl_coef = what_if.kl.coef if any(change.startswith("kl.coef=") for change in changes) else None
    rollouts = rescored(trained.rollouts, here.replay, what_if)
    return outcome(what_if, before, _with_rollouts(trained, rollouts), kl_coef=kl_coef)


def _with_rollouts(trained: TrainedStep, rollouts: tuple[Rollout, ...]) -> TrainedStep:
    return TrainedStep(**{**vars(trained), "rollouts": rollouts})


def _begun(settings: Settings, start: Start, first: TrainedStep) -> PpoStep:
    """
    Raises:
        DataError: these are not the weights that the first step improved.
    """
    step = _built(settings)
    if start.checkpoint is not None:
        load_checkpoint(start.checkpoint, step)
    if published_sha256(step.learner.policy) != first.weights_before:
        raise DataError(
            f"{start} has other weights than those that step {first.step} was made from"
            + ("; the model's folder was changed since" if start.checkpoint is None else ""),
            path=start.checkpoint or settings.ppo.model or start_model(settings),
        )
    return step


def _built(settings: Settings) -> PpoStep:
    tokenizer = load_tokenizer(settings.ppo.model or start_model(settings))
    return build_step(settings, tokenizer, load_reference)


def _train(step: PpoStep, trained: TrainedStep) -> Figures:
    _check_hidden_states(step, trained)
    step.learner.begin_step(trained.step - 1)
    return asdict(step(trained.rollouts))


def _check_hidden_states(step: PpoStep, trained: TrainedStep) -> None:
    """
    Raises:
        DataError: they lay in files, and were not kept.
    """
    for blob in (blob for rollout in trained.rollouts for blob in blobs_of(rollout)):
        try:
            read_blob(step.blobs or Path(), blob)
        except RequestError as error:
            raise DataError(
                f"step {trained.step}: the reference's hidden states were too large for a message and were not kept, "
                "so exact KL cannot be computed again; a run with ppo.keep_hidden_states = true keeps them"
            ) from error


def _as_on_the_machine(trained: TrainedStep) -> None:
    set_threads(int(trained.machine.get("threads", 0)))
    if trained.settings["run"].get("deterministic"):
        set_deterministic()


def _row(found: Outcome) -> dict[str, Any]:
    return {**found.figures, "weights": found.weights_sha256}


def _tell(
    found: Mapping[str, Any],
    start: Start,
    number: int,
    different: Sequence[str],
    strayed: int | None,
    trained: TrainedStep,
) -> None:
    """
    Raises:
        StageFailed: it is not what was recorded.
    """
    if "change_length" in found:
        print(
            f"with the changes the step moves the policy {found['change_length']:.4g} times as far, at a cosine of "
            f"{found['change_cosine']:.4g} to the way it went"
        )
    if found["identical"]:
        between = number - start.step - 1
        count = len(found["figures"]["computed again"]) - 1
        print(
            f"bit-identical: {count} figures and the weights, from {start}"
            + (f" through {between} steps between, their weights too" if between else "")
        )
        return
    here = about_machine()
    other = [
        f"{name} {value}, here {here.get(name)}" for name, value in trained.machine.items() if value != here.get(name)
    ]
    raise StageFailed(
        f"step {number} is not bit-identical to what was recorded: "
        + (f"the weights differ from step {strayed} on" if strayed else f"{', '.join(different)} differ")
        + (f"; it was made with {'; '.join(other)}" if other else "")
    )
