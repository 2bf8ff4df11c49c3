"""What the trainer writes down: metrics, TensorBoard, sample tables, and which rollouts each step trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rlhf.models.folders import storage_errors
from rlhf.ppo.invariants import Diagnosis
from rlhf.settings.paths import RunPaths
from rlhf.wire.records import Rollout


class RunRecords:
    """
    Args:
        step: the step the trainer goes on from; rows of later ones, which a restart undid, are removed from the curves.
    """

    def __init__(self, paths: RunPaths, step: int) -> None:
        self.paths = paths
        with storage_errors(paths.folder):
            paths.sample_tables.mkdir(parents=True, exist_ok=True)
            _keep_rows_before(paths.metrics, step)
            _drop_cut_row(paths.trained)
        self.tensorboard = SummaryWriter(str(paths.tensorboard / "ppo"), purge_step=step)

    def step(
        self,
        epoch: int,
        step: int,
        figures: Mapping[str, float],
        batch: Sequence[Rollout],
        diagnoses: Sequence[Diagnosis] = (),
    ) -> None:
        """One optimisation step: `step` counts from 1 and is the step of the weights it made."""
        # Before the checkpoint that makes the step count: the audit drops the rows of steps that were undone.
        _append(self.paths.trained, {"epoch": epoch, "step": step, "rollout_ids": [r.rollout_id for r in batch]})
        found = [asdict(diagnosis) for diagnosis in diagnoses]
        _append(self.paths.metrics, {"step": step, "epoch": epoch, **figures, "diagnoses": found})
        for name, value in figures.items():
            self.tensorboard.add_scalar(name, value, step)

    def rows(self) -> list[dict[str, Any]]:
        """Of the steps so far, as `step` wrote them."""
        if not self.paths.metrics.exists():
            return []
        return [json.loads(line) for line in self.paths.metrics.read_text(encoding="utf-8").splitlines()]

    def samples(self, step: int, batch: Sequence[Rollout]) -> None:
        """A table of the completions that a step trains on, best score first."""
        rows: list[dict[str, Any]] = [
            {
                "prompt": rollout.prompt,
                "completion": completion.text,
                "score": round(completion.score, 4),
                "finish_reason": completion.finish_reason.name.lower(),
                "tokens": int(completion.response_mask.sum()),
                "weights": str(completion.versions[-1].version) if completion.versions else "",
            }
            for rollout in batch
            for completion in rollout.completions
        ]
        rows.sort(key=lambda row: float(row["score"]), reverse=True)
        path = self.paths.sample_tables / f"step-{step:06d}.jsonl"
        with storage_errors(path):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def close(self) -> None:
        self.tensorboard.close()


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with storage_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _drop_cut_row(path: Path) -> None:
    """A row that a kill or a full disk cut short; its step never counted, and the next row would be glued to it."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _keep_rows_before(path: Path, step: int) -> None:
    """A killed trainer may have written half a row; it goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
