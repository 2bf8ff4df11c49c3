"""A sum of many numbers: nothing but reading, which is what a forward pass over logits comes down to."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(numbers, sums, each, BLOCK: tl.constexpr):
    """Program i sums numbers[i * each : (i + 1) * each]; `each` is a multiple of BLOCK."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, each, BLOCK):
        at = numbers + program * each + start + tl.arange(0, BLOCK)
        total += tl.load(at, eviction_policy="evict_first").to(tl.float32)
    tl.store(sums + program, tl.sum(total, axis=0))
