"""A run of its own for tests that start real processes: tiny models, a rule for a reward, embedded Redis."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.settings.paths import RunPaths
from support.tiny import tiny_lm_folder

RULE = """
def score(items):
    return [len(set(item.tokens)) / 8 for item in items]
"""


class Run:
    """`rlhf run` of the stage `ppo` alone."""

    def __init__(self, folder: Path, *, rule: str = RULE, sections: dict[str, dict[str, Any]] | None = None) -> None:
        self.paths = RunPaths(folder / "runs" / "tiny")
        self.config = folder / "config.toml"
        tiny_lm_folder(self.paths.pretrained)
        self.paths.prompts.parent.mkdir(parents=True)
        rows = [{"prompt": text} for text in ("A fine", "The plot was", "I liked", "Avoid")]
        self.paths.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "rule.py").write_text(rule)
        settings: dict[str, dict[str, Any]] = {
            "run": {"name": "tiny", "folder": str(folder / "runs"), "stages": ["ppo"]},
            "policy": {"threads": 1},
            "reference": {"threads": 1},
            "reward": {"rule": f"{folder / 'rule.py'}:score"},
            "critic": {"init_from": "policy"},
            "sampling": {"max_new_tokens": 8},
            "redis": {"reclaim_idle_s": 3.0},
            "ppo": {"steps": 6, "batch_prompts": 8, "epochs": 1, "checkpoint_every": 5, "threads": 1},
        }
        for section, values in (sections or {}).items():
            settings.setdefault(section, {}).update(values)
        self.config.write_text(_toml(settings))

    def rlhf(self, verb: str, *options: str) -> subprocess.Popen[str]:
        """The command as a person would run it; its output is text in `stdout`."""
        command = [sys.executable, "-m", "rlhf.cli.main", verb, *options]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self) -> subprocess.Popen[str]:
        return self.rlhf("run", str(self.config))

    def steps(self) -> int:
        """Optimisation steps made so far."""
        if not self.paths.metrics.exists():
            return 0
        return len(self.paths.metrics.read_text().splitlines())

    def processes(self) -> dict[str, dict[str, Any]]:
        """By name, as the supervisor last wrote them down."""
        if not self.paths.processes.exists():
            return {}
        return {process["name"]: process for process in json.loads(self.paths.processes.read_text())}


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} took longer than {timeout_s:.0f} s"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """A zombie has ended, whatever its parent is waiting for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _toml(sections: dict[str, dict[str, Any]]) -> str:
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"
