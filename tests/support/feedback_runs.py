"""A run of its own with rounds of feedback: a tiny model, annotators who like many different letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.runs import Run

UTILITY = """
def taste(items):
    return [float(len(set(item.completion))) for item in items]
"""
PROMPTS = [
    f"{first} {second}" for first in ("A", "The", "I", "One", "No") for second in ("film", "plot", "cast", "end")
]


def rounds_of_feedback(folder: Path, sections: dict[str, dict[str, Any]] | None = None, **feedback: Any) -> Run:
    """
    Args:
        sections: what is other than here.
    """
    (folder / "taste.py").write_text(UTILITY)
    own: dict[str, dict[str, Any]] = {
        "run": {"stages": ["sample", "rank", "reward-model", "ppo"], "max_restarts": 9},
        "reward": {"rule": "", "threads": 1, "follow_poll_s": 0.2},
        "sample": {"completions": 3, "threads": 1},
        "rank": {"utility": f"{folder / 'taste.py'}:taste", "reliabilities": [0.95, 0.9]},
        "reward_model": {"members": 3, "epochs": 2, "threads": 1, "max_length": 64},
        "ppo": {"steps": 20, "batch_prompts": 8, "epochs": 1, "checkpoint_every": 5, "threads": 1},
        "feedback": {"prompts": 12, "completions": 3, "audit_pairs": 6, "candidates": 1.5, **feedback},
    }
    for name, values in (sections or {}).items():
        own.setdefault(name, {}).update(values)
    run = Run(folder, sections=own)
    run.paths.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return run


def figures(run: Run, number: int) -> dict[str, Any]:
    """Of one round."""
    found: dict[str, Any] = json.loads((run.paths.rounds / str(number) / "round.json").read_text())
    return found
