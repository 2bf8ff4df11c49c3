"""Which code a tensor runs through, and the launch of a kernel.

A CUDA or HIP tensor goes to Triton. A CPU tensor goes to Triton's interpreter where TRITON_INTERPRET=1 was set before
this package was imported, which is how the kernels are tested without a GPU; else, as on any other device, to the same
computation in plain torch.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

launches: Counter[str] = Counter()
"""How often each kernel was launched by this process."""


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor are Triton's."""
    return tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")


def launch(kernel: Any, programs: int, tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Run that many programs of a kernel on the tensor's device; none where there is nothing to do."""
    if programs == 0:
        return
    launches[kernel.__name__] += 1
    if tensor.is_cuda:
        # A process may hold several GPUs, and Triton launches on the current one.
        with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
            # The exponent's argument is one fused multiply and add; newer Tritons no longer fuse unless asked to.
            kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)
    else:
        kernel[(programs,)](*arguments, **options)
