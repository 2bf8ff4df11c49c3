"""What rounds of feedback have left in the run folder, for the summary and the report."""

from __future__ import annotations

from typing import Any

from rlhf.models.folders import read_json
from rlhf.settings.paths import RunPaths


def read_rounds(paths: RunPaths) -> list[dict[str, Any]]:
    """round.json of each finished round but the first, which only keeps what the initial policy said; by number."""
    folders = [folder for folder in paths.rounds.glob("*") if folder.name.isdecimal() and folder.name != "0"]
    files = [folder / "round.json" for folder in sorted(folders, key=lambda folder: int(folder.name))]
    return [read_json(file) for file in files if file.exists()]
