"""Training of a reward model's members: together on a shared trunk, or one after the other, each on a trunk of its own
or with an adapter of its own on one trunk, which is put on, trained and taken off before the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.models.adapted import on_one_trunk
from rlhf.models.adapters import Factors, inject_adapter, take_adapter
from rlhf.models.causal import disable_dropout
from rlhf.models.ensemble import Trunk
from rlhf.models.reward import RewardModel
from rlhf.ppo.settings import LoraSettings
from rlhf.preference.comparisons import Comparison, ComparisonBatch, Numbering, batch_of, by_completions, sha256_of
from rlhf.preference.model import PreferenceModel
from rlhf.preference.settings import RewardModelSettings
from rlhf.settings.paths import RunPaths
from rlhf.sft.batches import batches_per_epoch, shuffled_batches
from rlhf.sft.loop import Job, Trained, remove_training_state, state_folder_of, train


@dataclass(frozen=True)
class Fitted:
    models: list[PreferenceModel]
    """One with all members' heads, or one for each member. In eval mode."""
    trunks: list[Trunk]
    """What the models' heads are on, as it is served; the first is the first model's reward model."""
    numbering: Numbering
    trained: Trained
    """Of the last of them, with the seconds of all."""


def fit(
    start: Path,
    training: Sequence[Comparison],
    pad_id: int,
    section: RewardModelSettings,
    paths: RunPaths,
    out: Path,
) -> Fitted:
    """
    Args:
        start: folder of the language model whose trunk every model starts from.
        out: of the reward model, beside which checkpoints lie.

    Raises:
        ModelError, StorageError, StageFailed: see `rlhf.sft.loop.train` and `rlhf.models`.
        SettingsError: `lora_target_modules` names what can have no adapter.
    """
    numbering = Numbering.of(training, section.members, section.seed)
    if section.trunk == "shared" or (section.trunk == "separate" and section.members == 1):
        model, trained = _fit_one(_new(start, section), training, numbering, pad_id, section, paths, out)
        return Fitted([model], [model.reward], numbering, trained)
    base = _new(start, section) if section.trunk == "lora" else None
    models: list[PreferenceModel] = []
    adapters: list[Factors] = []
    seconds = 0.0
    for member in range(section.members):
        own = section.model_copy(update={"seed": section.seed + member})
        drawn = [each for each in training if numbering.draws[member, numbering.prompts[each.prompt]] > 0]
        reward = _new(start, own) if base is None else _with_adapter(base, own)
        model, trained = _fit_one(reward, drawn, numbering.member(member), pad_id, own, paths, _member_out(out, member))
        models.append(model)
        seconds += trained.seconds
        if base is not None:
            adapters.append(take_adapter(base.trunk))
    trunks: list[Trunk] = [model.reward for model in models]
    if base is not None:
        trunks = on_one_trunk(base, adapters, section.lora_alpha)
    return Fitted(models, trunks, numbering, replace(trained, seconds=seconds))


def remove_fit_state(out: Path, section: RewardModelSettings) -> None:
    """Once the reward model is complete."""
    for each in (out, *(_member_out(out, member) for member in range(section.members))):
        remove_training_state(state_folder_of(each))


def _new(start: Path, section: RewardModelSettings) -> RewardModel:
    reward = RewardModel.new(start, seed=section.seed, device=section.device)
    disable_dropout(reward)
    return reward


def _with_adapter(base: RewardModel, section: RewardModelSettings) -> RewardModel:
    """The base itself, with a new head and a new adapter, which alone will learn."""
    base.draw_head(section.seed)
    settings = LoraSettings(
        rank=section.lora_rank, alpha=section.lora_alpha, target_modules=section.lora_target_modules
    )
    inject_adapter(base.trunk, settings, section.seed, "reward_model.lora_target_modules")
    return base


def _fit_one(
    reward: RewardModel,
    training: Sequence[Comparison],
    numbering: Numbering,
    pad_id: int,
    section: RewardModelSettings,
    paths: RunPaths,
    out: Path,
) -> tuple[PreferenceModel, Trained]:
    model = PreferenceModel(reward, section, len(numbering.annotators), len(numbering.draws))
    trained = train(_job(model.train(), training, numbering, pad_id, section, paths, out))
    return model.eval(), trained


def _job(
    model: PreferenceModel,
    training: Sequence[Comparison],
    numbering: Numbering,
    pad_id: int,
    section: RewardModelSettings,
    paths: RunPaths,
    out: Path,
) -> Job[ComparisonBatch]:
    groups = by_completions(training)
    per_epoch = batches_per_epoch(len(groups), section.prompts_per_batch)
    batch = shuffled_batches(groups, section.prompts_per_batch, section.seed)
    total_weight = float(sum(len(comparison.ranks) - 1 for comparison in training))
    return Job(
        name="reward-model",
        model=model,
        loss=lambda some: model(some, total_weight),
        micro_batch=lambda index: batch_of(batch(index), pad_id, numbering),
        micro_batches=per_epoch * section.epochs,
        settings=section,
        state_folder=state_folder_of(out),
        tensorboard=paths.tensorboard / out.name,
        data={"comparisons": sha256_of(training)},
    )


def _member_out(out: Path, member: int) -> Path:
    return out.with_name(f"{out.name}-{member}")
