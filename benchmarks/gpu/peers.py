"""What others publish for the same work, from a folder beside this file that git ignores, or as installed.

Each does less than this project's operator, and its note says what. A peer that is not there, or that raises, becomes a
reason in the results.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpu.providers import Outputs, Provider, Timed, gradients
from gpu.shapes import Linear, Logits

FOLDER = Path(__file__).with_name(".peers")


class Absent(Exception):
    """A peer that cannot be compared with, and why."""


def versions() -> dict[str, str]:
    """Of those that are there."""
    _look_there()
    found = {}
    for name in ("liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found | {"verl's kernels": "present" if (FOLDER / "verl_kernel").is_dir() else "absent"}


def logits_forward() -> list[Provider]:
    return [Provider("liger cross-entropy", _liger_logits, "no entropy")]


def linear_forward() -> list[Provider]:
    return [
        Provider("cut-cross-entropy", _cce_forward, "twice, for both models; no KL, no entropy"),
        Provider("verl", _verl_forward, "twice, for both models; no KL"),
    ]


def linear_train() -> list[Provider]:
    return [
        Provider("liger fused linear cross-entropy", _liger_train, "one loss, no log-probs"),
        Provider("cut-cross-entropy", _cce_train, "no entropy; its default leaves small gradients out"),
        Provider("verl", _verl_train),
    ]


def linear_ppo() -> list[Provider]:
    return [Provider("liger fused linear JSD", _liger_jsd, "exact KL alone, as one loss: no log-probs, no PPO")]


def _liger_logits(x: Logits) -> Timed:
    liger = _load("liger_kernel.transformers.functional")

    def run() -> Outputs:
        with torch.no_grad():
            return {"logprobs": -liger.liger_cross_entropy(x.logits, x.labels, reduction="none")}

    return run


def _liger_train(x: Linear) -> Timed:
    liger = _load("liger_kernel.transformers.functional")
    return lambda: gradients(
        liger.liger_fused_linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="sum"),
        x,
    )


def _liger_jsd(x: Linear) -> Timed:
    liger = _load("liger_kernel.transformers.fused_linear_jsd")
    module = liger.LigerFusedLinearJSD(jsd_beta=1.0)

    def run() -> Outputs:
        found = gradients(module(x.hidden, x.weight, x.ref_hidden, x.ref_weight, None), x)
        return {"d_weight": found["d_weight"]}

    return run


def _cce_forward(x: Linear) -> Timed:
    cce = _load("cut_cross_entropy")

    def run() -> Outputs:
        with torch.no_grad():
            own = cce.linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="none")
            cce.linear_cross_entropy(x.ref_hidden, x.ref_weight, x.labels, reduction="none")
            return {"logprobs": -own}

    return run


def _cce_train(x: Linear) -> Timed:
    cce = _load("cut_cross_entropy")

    def run() -> Outputs:
        loss = cce.linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="none")
        return {"logprobs": -loss.detach()} | gradients(loss, x, -x.g_logprobs.to(loss.dtype))

    return run


def _verl_forward(x: Linear) -> Timed:
    verl = _verl()

    def run() -> Outputs:
        with torch.no_grad():
            logprobs, entropy = verl.linear_cross_entropy(x.hidden, x.weight, x.labels)
            verl.linear_cross_entropy(x.ref_hidden, x.ref_weight, x.labels)
            return {"logprobs": logprobs, "entropy": entropy}

    return run


def _verl_train(x: Linear) -> Timed:
    verl = _verl()

    def run() -> Outputs:
        logprobs, entropy = verl.linear_cross_entropy(x.hidden, x.weight, x.labels)
        found = {"logprobs": logprobs.detach(), "entropy": entropy.detach()}
        return found | gradients((logprobs, entropy), x, (x.g_logprobs, torch.zeros_like(entropy)))

    return run


def _look_there() -> None:
    """Last, so that no package of the folder stands before what the machine has."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def _load(name: str) -> Any:
    if not torch.cuda.is_available():
        raise Absent("needs a GPU")
    _look_there()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"not importable, from {FOLDER.name}/ or else: {error}") from error


def _verl() -> Any:
    """Its two files, without the package around them: what they import of it is put in its place."""
    device = _stand_in("verl.utils.device")
    device.get_device_capability = torch.cuda.get_device_capability  # type: ignore[attr-defined]
    device.get_device_name = lambda: "cuda"  # type: ignore[attr-defined]
    device.is_cuda_available = torch.cuda.is_available()  # type: ignore[attr-defined]
    device.get_torch_device = lambda: torch.cuda  # type: ignore[attr-defined]
    functional = _stand_in("verl.utils.torch_functional")
    functional.resolve_temperature_for_fused_kernel = _resolved  # type: ignore[attr-defined]
    return _load("verl_kernel.linear_cross_entropy")


def _resolved(hidden: Tensor, temperature: float) -> tuple[Tensor, float]:
    return hidden, float(temperature)


def _stand_in(name: str) -> ModuleType:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(parts[end - 1]))
    return sys.modules[name]
