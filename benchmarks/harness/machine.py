"""Where and with what a figure was measured, and what a process uses."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "redis", "numpy")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def described(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Machine, versions, date and commit, as they are kept beside the figures."""
    versions = {name: version(name) for name in packages}
    if "redis" in packages:
        versions["redis-server"] = _redis_server()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def cpu_s(pid: int) -> float:
    """Seconds that a process and its threads have computed, to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def peak_rss_mib(pid: int) -> float:
    """The most that a process has had in memory, pages shared with others included."""
    return _kib(Path(f"/proc/{pid}/status"), "VmHWM:") / 1024


def reset_peak_rss() -> None:
    """This process's peak is what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def rss_mib(pid: int) -> float:
    """What a process has in memory now, pages shared with others included."""
    return _kib(Path(f"/proc/{pid}/status"), "VmRSS:") / 1024


def pss_mib(pid: int) -> float:
    """What a process has in memory now; pages shared with others count by share."""
    return _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") / 1024


def _kib(path: Path, name: str) -> float:
    line = next(line for line in path.read_text().splitlines() if line.startswith(name))
    return float(line.split()[1])


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _redis_server() -> str:
    # Only here: the kernels' benchmark runs where the services' packages are not installed.
    from rlhf.errors import RedisUnsuitable
    from rlhf.supervisor.embedded_redis import find_server

    try:
        return ".".join(map(str, find_server().version))
    except RedisUnsuitable:
        return "none"


def _commit() -> str:
    """With a plus where code differs from it; what the benchmarks themselves write does not count."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    written = (":!benchmarks/results", ":!README.md", ":!benchmarks/README.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return commit + ("+" if changed else "") or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return ""  # a machine without git: the commit is then unknown
    return done.stdout.strip()
