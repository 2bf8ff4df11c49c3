"""`make bench`: every benchmark as a process of its own, one after the other; then the tables.

With names, those alone: `make bench BENCH="generation weights"`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from harness.bench import RESULTS, say
from harness.machine import ROOT
from table import NAMES, everything, headlines, load, write_into

TIMEOUT_S = 1200.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all of them")
    chosen = parser.parse_args().names or NAMES
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    began_s = time.monotonic()
    failed = [name for name in chosen if not _run(name)]
    results = load(RESULTS)
    write_into(ROOT / "README.md", headlines(results))
    write_into(ROOT / "benchmarks" / "README.md", everything(results))
    print(headlines(results))
    say(f"{len(chosen)} benchmarks in {time.monotonic() - began_s:.0f} s")
    for name in failed:
        say(f"{name} FAILED; its figures above, if any, are of an earlier run")
    return 1 if failed else 0


def _run(name: str) -> bool:
    say(f"\n{name}")
    # Every process has its threads from its own settings; this holds for whatever looks at the environment.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    script = Path(__file__).with_name(f"{name}.py")
    try:
        return subprocess.run([sys.executable, script], env=environment, timeout=TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        say(f"{name} took longer than {TIMEOUT_S:.0f} s")
        return False


if __name__ == "__main__":
    sys.exit(main())
