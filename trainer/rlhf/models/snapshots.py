"""Snapshots: the policy as it was every few steps, each a `from_pretrained` folder named by its step.

A checkpoint is for going on from and soon replaced; snapshots are for what is asked about a run afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.causal import save_model


def snapshots(folder: Path) -> dict[int, Path]:
    """By step, earliest first."""
    if not folder.is_dir():
        return {}
    return {int(path.name): path for path in sorted(folder.iterdir(), key=_step) if path.name.isdigit()}


def save_snapshot(
    folder: Path, step: int, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep: int
) -> None:
    """Then removes as many as are above `keep`, so that the others stay spread over the whole run.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    save_model(policy, tokenizer, folder / str(step))
    kept = snapshots(folder)
    for surplus in surplus_steps(list(kept), keep):
        shutil.rmtree(kept[surplus])


def remove_snapshots_after(folder: Path, step: int) -> None:
    """Those of steps that a restart undid; they will be made again."""
    for later, path in snapshots(folder).items():
        if later > step:
            shutil.rmtree(path)


def surplus_steps(steps: Sequence[int], keep: int) -> list[int]:
    """Which ones to remove: again and again the one whose neighbours are closest together, the earliest such one. The
    first one's neighbour is step 0, the initial policy; the newest stays.

    Args:
        steps: ascending.
    """
    kept, surplus = list(steps), []
    while len(kept) > max(keep, 1):
        before = [0, *kept]
        place = min(range(len(kept) - 1), key=lambda n: kept[n + 1] - before[n])
        surplus.append(kept.pop(place))
    return surplus


def _step(path: Path) -> int:
    return int(path.name) if path.name.isdigit() else -1
