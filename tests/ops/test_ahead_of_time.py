"""Every kernel compiles for every GPU, without spilled registers and within its budget of instructions.

The budget is what one position of the vocabulary may cost where reading memory is to be the limit: an H200 that reads
4.3 TB/s passes a position of one model's bfloat16 logits while its schedulers issue 13.8 instructions of a thread, and
its special function units compute 1.72 exponentials; two models, twice that; a gradient written in place moves four
bytes (27.6) or, with the reference, six (41.4).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ahead_of_time

TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
BUDGET = {
    "row_partials one bf16": (10.5, 1.2),
    "row_partials two bf16": (22.5, 2.3),
    "row_partials one fp32": (10.5, 1.2),
    "row_partials two fp32": (22.5, 2.3),
    "row_gradient one bf16": (22.0, 1.0),
    "row_gradient two bf16": (31.5, 1.0),
    "row_gradient one fp32": (22.0, 1.0),
    "row_gradient two fp32": (31.5, 1.0),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, float]]]:
    """In a process of its own: what was decorated for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = Path(ahead_of_time.__file__)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_for_every_target_without_spills(compiled):
    names = {name.split()[0] for name in compiled}
    assert names == {"row_partials", "row_outputs", "row_gradient", "gae_scan"}
    for name, targets in compiled.items():
        assert set(targets) == TARGETS, name
        for target, figures in targets.items():
            assert figures["spilled"] == 0, f"{name} on {target}: {figures}"
            assert figures["registers"] > 0


def test_instructions_and_exponentials_per_position(compiled):
    counted = {name: targets["sm_90"] for name, targets in compiled.items() if "instructions" in targets["sm_90"]}
    assert set(counted) == set(BUDGET)
    for name, (instructions, exponentials) in BUDGET.items():
        figures = counted[name]
        assert 0.6 * instructions < figures["instructions"] <= instructions, f"{name}: {figures}"
        assert 0.8 * exponentials < figures["exponentials"] <= exponentials, f"{name}: {figures}"
        assert figures["wide_loads"] >= 4, f"{name}: {figures}"
        assert figures["nan_maxima"] >= 1, f"{name}: {figures}"
