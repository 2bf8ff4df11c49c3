"""What each stage leaves in the run folder, so that it can be removed when the stage begins anew."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhf.cli.records import started_path
from rlhf.errors import StageFailed
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings


def outputs(stage: str, paths: RunPaths) -> Sequence[Path]:
    """Files and folders, the stage's record first: without it nothing that is left counts as a result."""
    own: dict[str, Sequence[Path]] = {
        "data": [
            *(paths.texts, paths.heldout_texts, paths.prompts, paths.heldout_prompts, paths.validation_prompts),
            *(paths.annotators_labelled, paths.labelled),
        ],
        "world": [paths.texts, paths.heldout_texts, paths.prompts, paths.heldout_prompts, paths.labelled],
        "pretrain": _trained(paths.pretrained),
        "sft": _trained(paths.sft),
        "sample": [paths.samples, paths.heldout_samples],
        "rank": [paths.comparisons, paths.heldout_comparisons],
        "reward-model": _trained(paths.reward_model),
        "ppo": [
            *(paths.checkpoints, paths.weights, paths.redis, paths.policy, paths.metrics, paths.trained),
            *(paths.sample_tables, paths.snapshots, paths.history, paths.rounds),
        ],
        "evaluate": [paths.evaluation, paths.frontier],
        "report": [paths.report],
    }
    record = paths.stages / f"{stage}.json"
    return [record, started_path(paths.stages, stage), *own[stage], paths.tensorboard / stage]


def clear(stage: str, paths: RunPaths) -> None:
    """Removes what an earlier run of the stage left. Places outside the run folder, set by the stage's `out`, stay."""
    for path in outputs(stage, paths):
        _remove(path)
        if path.parent.is_dir():
            for unfinished in path.parent.glob(f".{path.name}*"):
                _remove(unfinished)


def clear_all(settings: Settings) -> None:
    """`--fresh`: removes what the run's stages have left, and nothing that somebody else put there."""
    paths = settings.paths
    for stage in settings.run.stages:
        clear(stage, paths)
    for path in (paths.processes, paths.settings, paths.summary, paths.redis):
        _remove(path)
    for log in paths.logs.glob("*.log"):
        # run.log is open by now.
        if log.name != "run.log":
            _remove(log)


def refuse_foreign(paths: RunPaths) -> None:
    """
    Raises:
        StageFailed: the folder holds something, and no run has ever been there.
    """
    folder = paths.folder
    if folder.is_dir() and any(folder.iterdir()) and not (paths.lock.exists() or paths.stages.exists()):
        raise StageFailed(
            f"{folder} is not empty and is no run folder: it has neither {paths.lock.name} nor {paths.stages.name}/; "
            "choose another --run or run.folder"
        )


def _trained(model: Path) -> list[Path]:
    """The model and, beside it, the checkpoints of its training."""
    return [model, model.with_name(f"{model.name}.training")]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
