"""Compile every kernel for GPUs that need not be there, and print what came out as JSON.

Run as a process of its own, without TRITON_INTERPRET: an interpreted function cannot be compiled. For each kernel and
target: registers, bytes of spilled registers, and for sm_90 the instructions and exponentials (MUFU.EX2) that one
position of the vocabulary costs in the kernel's loop.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlhf.ops import row_kernels, scan_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for a large vocabulary of bfloat16 logits."""

    name: str
    kernel: Any
    dtypes: dict[str, str]
    """Of arguments that are neither int32 nor constants."""
    constants: dict[str, Any]
    warps: int
    positions: int = 0
    """Of the vocabulary, that one program sees in an iteration (or, without a loop, at all); 0: not counted."""
    options: dict[str, Any] = field(default_factory=dict)


def variants() -> Iterator[Variant]:
    """What `rlhf.ops.rows` and `rlhf.ops.advantages` launch."""
    rows = dict.fromkeys(
        ("partials", "logprobs", "ref_logprobs", "kl", "entropy", "logsumexp", "ref_logsumexp", "norms"), "*fp32"
    )
    upstream = dict.fromkeys(("g_logprobs", "g_kl", "g_entropy", "g_logsumexp"), "*fp32")
    common = {"labels": "*i64", "temperature": "fp32", **rows, **upstream}
    for dtype, lanes in (("*bf16", 1024), ("*fp32", 512)):
        logits = {**common, "logits": dtype, "ref_logits": dtype}
        short = dtype[1:]
        for has_ref in (False, True):
            models = "two" if has_ref else "one"
            tile = {"HAS_REF": has_ref, "PARTS": 1, "R": 8, "L": lanes}
            yield Variant(f"row_partials {models} {short}", row_kernels.row_partials, logits, tile, 4, 8 * lanes)
            flags = {
                "HAS_LOGPROBS": True,
                "HAS_LOGSUMEXP": False,
                "HAS_KL": has_ref,
                "HAS_ENTROPY": True,
                "BLOCK": 8192,
            }
            gradient = {**logits, "gradient": "*bf16"}
            yield Variant(f"row_gradient {models} {short}", row_kernels.row_gradient, gradient, flags, 8, 8192)
    yield Variant("row_outputs", row_kernels.row_outputs, common, {"HAS_REF": True, "PARTS": 1, "B": 256}, 4)
    scan = {
        "rewards": "*fp32",
        "values": "*fp32",
        "advantages": "*fp32",
        "response_mask": "*u8",
        "gamma": "fp32",
        "lam": "fp32",
    }
    yield Variant("gae_scan", scan_kernels.gae_scan, scan, {"BLOCK": 1024}, 4)


def compile_for(variant: Variant, target: GPUTarget) -> Any:
    """As the launcher specialises it: pointers and strides divisible by 16, rows of one dimension."""
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.dtypes.get(n, "i32") for n in names}
    divisible = [i for i, n in enumerate(names) if signature[n].startswith("*") or n.endswith("stride") or n == "vocab"]
    source = ASTSource(
        fn=variant.kernel, signature=signature, constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )  # fmt: skip
    options = {"num_warps": variant.warps, **variant.options}
    if target.backend == "cuda":
        options["enable_fp_fusion"] = True
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers and spilled bytes of one compiled kernel."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")
        )  # type: ignore[index]
        return {"registers": registers, "spilled": spills}
    found = _tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    match = re.search(r"REG:(\d+) STACK:(\d+)", found)
    assert match, found
    return {"registers": int(match[1]), "spilled": int(match[2])}


def per_position(compiled: Any, variant: Variant) -> dict[str, float]:
    """Instructions and exponentials of the longest loop, or of a kernel without one, by position of the vocabulary."""
    lines = [line for line in _tool("nvdisasm", "-c", compiled.asm["cubin"]).splitlines() if line.strip()]
    starts = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    loops = [
        lines[starts[match[1]] : i + 1]
        for i, line in enumerate(lines)
        if (match := re.search(r"BRA.*\((\.L_x_\d+)\)", line)) and starts.get(match[1], i) < i
        if any("LDG" in inner for inner in lines[starts[match[1]] : i])
    ]
    body = max(loops, key=len) if loops else lines
    body = body[: next((i for i, line in enumerate(body) if "EXIT" in line and i > len(body) // 2), len(body))]
    instructions = [line for line in body if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    own = variant.positions / (32 * variant.warps)
    return {
        "instructions": round(len(instructions) / own, 2),
        "exponentials": round(sum("MUFU.EX2" in line for line in instructions) / own, 2),
        # A maximum that drops NaN would hide a NaN logit; the interpreter's never does, so only this shows it.
        "nan_maxima": round(sum("FMNMX.NAN" in line for line in instructions) / own, 2),
        "wide_loads": sum("LDG.E" in line and ".128" in line for line in instructions),
    }


def _tool(name: str, option: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([BIN / name, option, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """One JSON object: kernel -> target -> figures."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for variant in variants():
        for name, target in TARGETS.items():
            compiled = compile_for(variant, target)
            figures: dict[str, float] = dict(resources(compiled, target))
            if name == "sm_90" and variant.positions:
                figures |= per_position(compiled, variant)
            found.setdefault(variant.name, {})[name] = figures
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
