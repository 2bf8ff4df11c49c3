"""How near do the kernels come to what the GPU can do, and what do others need? `make bench-gpu`.

Needs torch, Triton and this checkout, nothing installed: `python3 benchmarks/gpu/run.py`. Every case measures in turn,
in one loop: this project's operator, plain torch, torch.compile, the peers that are there, and the parts of its ceiling
(`gpu.ceilings`): copies, reads and matrix products of the same shapes, at the same clocks.

`--tiny` tries everything at sizes at which nothing is measured, on a CPU too.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The folder of this file makes way: its modules are the package `gpu`.
sys.path[0:1] = [str(ROOT / "benchmarks"), str(ROOT / "kernels")]

from gpu.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
