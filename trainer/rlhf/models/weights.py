"""What the trainer publishes and the policy service loads: one safetensors file and a manifest that vouches for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from rlhf.errors import ModelError
from rlhf.models.folders import read_json, replacing_folder, sha256_file, write_json
from rlhf.wire.records import WeightVersion

WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class AdapterOf:
    """What an adapter's tensors mean something with; see `rlhf.models.adapters`."""

    base_sha256: str
    """Of the weights of the model that it was trained on."""
    scaling: float
    """W + scaling · B·A are the weights that it stands for."""


@dataclass(frozen=True)
class Manifest:
    version: WeightVersion
    size_bytes: int
    """Of model.safetensors."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name -> dtype (torch's name) and shape."""
    tokenizer_sha256: str
    parent: WeightVersion | None
    """The version these weights were trained from. None: the first of a run."""
    adapter: AdapterOf | None = None
    """None: the tensors are a whole model's."""


def adapter_of(model: nn.Module) -> AdapterOf | None:
    """None: the model has no adapter."""
    adapter: AdapterOf | None = getattr(model, "rlhf_adapter", None)
    return adapter


def mark_adapter(model: nn.Module, adapter: AdapterOf | None) -> None:
    """On the model itself, so that its copies have it too."""
    model.rlhf_adapter = adapter  # type: ignore[assignment]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, not copied; of tied ones only the first. Of a model with an adapter the
    adapter's alone: nothing else of it changes."""
    seen: set[int] = set()
    weights = {}
    adapter = adapter_of(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (adapter is None or ".lora_" in name):
            seen.add(id(tensor))
            weights[name] = tensor.detach()
    return weights


def learning_weights(model: nn.Module) -> dict[str, Tensor]:
    """`named_weights` without frozen parameters: all that training changes, so all that a checkpoint needs."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in named_weights(model).items() if name not in frozen}


def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies in place, so optimiser and tied modules keep their tensors. Nothing is changed if anything does not fit.

    Raises:
        ModelError: a name is missing or unknown, or a shape differs.
    """
    copy_tensors(named_weights(model), tensors)


def copy_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """`copy_weights` into some of a model's weights.

    Raises:
        ModelError: as there.
    """
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        raise ModelError(f"the weights do not fit the model: {_first(odd)} on one side only")
    wrong = [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        expected, received = tuple(own[wrong[0]].shape), tuple(tensors[wrong[0]].shape)
        raise ModelError(f"the weights do not fit the model: {wrong[0]} has shape {received}, {expected} expected")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def write_weights(
    folder: str | Path,
    model: nn.Module,
    *,
    run_id: str,
    epoch: int,
    step: int,
    tokenizer_sha256: str,
    parent: WeightVersion | None = None,
) -> WeightVersion:
    """Writes model.safetensors and manifest.json; the folder appears complete or not at all.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    tensors = _on_cpu(model)
    with replacing_folder(Path(folder)) as temporary:
        file = temporary / WEIGHTS_FILE
        save_file(tensors, file, metadata=_METADATA)
        version = WeightVersion(run_id, epoch, step, sha256_file(file))
        shapes = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
        size_bytes = file.stat().st_size
        manifest = Manifest(version, size_bytes, shapes, tokenizer_sha256, parent, adapter_of(model))
        write_json(temporary / MANIFEST_FILE, asdict(manifest))
    return version


def published_sha256(model: nn.Module) -> str:
    """Lower-case hex: of the file that `write_weights` would write of the model now."""
    return hashlib.sha256(save(_on_cpu(model), metadata=_METADATA)).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """
    Raises:
        ModelError: missing, or not what `write_weights` writes.
    """
    path = Path(folder) / MANIFEST_FILE
    content = read_json(path)
    try:
        return Manifest(
            version=WeightVersion(**content["version"]),
            size_bytes=int(content["size_bytes"]),
            tensors={name: (str(dtype), tuple(shape)) for name, (dtype, shape) in content["tensors"].items()},
            tokenizer_sha256=str(content["tokenizer_sha256"]),
            parent=None if content["parent"] is None else WeightVersion(**content["parent"]),
            adapter=None if content.get("adapter") is None else AdapterOf(**content["adapter"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} is no manifest of weights: {error!r}") from error


def load_weights(folder: str | Path, version: WeightVersion) -> dict[str, Tensor]:
    """Reads the tensors to the CPU after verifying size and hash.

    Raises:
        ModelError: the folder holds another version, or bytes that are not the manifest's.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.version != version:
        raise ModelError(f"{folder}: holds weights {manifest.version}, not {version}")
    verify_file(folder / WEIGHTS_FILE, manifest.size_bytes, version.sha256)
    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error


def verify_file(path: Path, size_bytes: int, sha256: str) -> None:
    """
    Raises:
        ModelError: missing, of another size, or with another hash.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    size = path.stat().st_size
    if size != size_bytes:
        raise ModelError(f"{path} has {size} bytes where {size_bytes} were written; it was cut short or replaced")
    if sha256_file(path) != sha256:
        raise ModelError(f"{path} was altered: its sha256 is not the one it was written with")


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in named_weights(model).items()}


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
