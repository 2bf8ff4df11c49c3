"""Device, number format and threads of a process, from a `Compute` section."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic

from rlhf.errors import SettingsError, first_line

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """
    Raises:
        SettingsError: not one of float32, bfloat16, float16.
    """
    if name not in _DTYPES:
        raise SettingsError(f"dtype: one of {', '.join(_DTYPES)} expected, {name!r} received")
    return _DTYPES[name]


def torch_device(name: str) -> torch.device:
    """
    Raises:
        SettingsError: no such kind of device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"device: {name!r} cannot be used on this machine ({first_line(error)}); set it to cpu"
        ) from error
    return device


def set_threads(threads: int) -> None:
    """CPU threads of torch in this process; 0 leaves torch's own choice."""
    if threads > 0:
        torch.set_num_threads(threads)


def about_machine() -> dict[str, str | int]:
    """What decides the last bits of a result beside code and data: equal here, equal sums."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def set_deterministic() -> None:
    """From here on torch takes operations that give the same bits every time, and raises where it knows none."""
    # cuBLAS: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # New memory need not be filled: that finds faults, and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
