"""The frozen reference's output layer, fetched from its service once; or read from its folder, where none runs.

With it and the hidden states that rollouts bring, the trainer has the reference's whole distribution at every token:
8 KB a token at a width of 4096 in bfloat16, where logits over 150,000 labels would be 300 KB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.errors import ModelError
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.compute import torch_dtype
from rlhf.models.folders import start_model
from rlhf.models.output_layer import OutputLayer, output_layer
from rlhf.ppo.settings import PpoSettings
from rlhf.serving.client import connect_sync, stream_sync
from rlhf.settings.run import Settings
from rlhf.v1 import reference_pb2, reference_pb2_grpc, tensor_pb2

_DTYPES = {
    tensor_pb2.DTYPE_FLOAT32: "float32",
    tensor_pb2.DTYPE_FLOAT16: "float16",
    tensor_pb2.DTYPE_BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class ReferenceLayer(OutputLayer):
    """In the service's dtype, on the trainer's device."""

    model_sha256: str
    """Of the reference's weights; rollouts carry it too."""


def fetch_reference(settings: PpoSettings, vocab_size: int) -> ReferenceLayer:
    """
    Args:
        vocab_size: of the policy.

    Raises:
        ModelError: what came is not what the service announced, or of another vocabulary than the policy's.
        RlhfError: the service is away, or refuses.
    """
    with connect_sync(settings.reference, token_file=settings.token_file, tls_ca=settings.tls_ca) as channel:
        parts = stream_sync(
            reference_pb2_grpc.ReferenceServiceStub(channel).Head,
            reference_pb2.HeadRequest(),
            timeout_s=settings.reference_timeout_s,
            wait_for_ready=True,
        )
        info = next(parts).info
        data = _received(parts, info)
    _check_vocabulary(info.vocab_size, vocab_size)
    values = torch.frombuffer(data, dtype=torch_dtype(_DTYPES[info.dtype])).to(settings.device)
    weight, bias = _apart(values, info)
    return ReferenceLayer(weight, bias, info.model_sha256)


def load_reference(settings: Settings, vocab_size: int) -> ReferenceLayer:
    """The same from the reference's folder, as its service would give it.

    Args:
        vocab_size: of the policy.

    Raises:
        ModelError: the folder holds no such model, or one of another vocabulary than the policy's.
    """
    folder = settings.reference.model or start_model(settings)
    model = load_causal_lm(folder, dtype=settings.reference.dtype)
    layer = output_layer(model)
    _check_vocabulary(len(layer.weight), vocab_size)
    weight, bias = (
        None if part is None else part.detach().to(settings.ppo.device) for part in (layer.weight, layer.bias)
    )
    assert weight is not None
    return ReferenceLayer(weight, bias, weights_sha256(folder))


def _check_vocabulary(found: int, vocab_size: int) -> None:
    """
    Raises:
        ModelError: they differ.
    """
    if found != vocab_size:
        raise ModelError(
            f"ppo.reference: the reference's output layer is over {found} labels and the policy's over {vocab_size}; "
            "exact KL needs one vocabulary (kl.estimator, kl.loss_estimator)"
        )


def _received(parts: Iterator[reference_pb2.HeadPart], info: reference_pb2.HeadInfo) -> bytearray:
    """
    Raises:
        ModelError: too many bytes, too few, or others than announced.
    """
    data, sha256 = bytearray(), hashlib.sha256()
    for part in parts:
        data += part.data
        sha256.update(part.data)
        if len(data) > info.size_bytes:
            break
    if len(data) != info.size_bytes or sha256.hexdigest() != info.sha256:
        raise ModelError(
            f"ppo.reference: the reference announced an output layer of {info.size_bytes} bytes with sha256 "
            f"{info.sha256[:12]}, and {len(data)} bytes with {sha256.hexdigest()[:12]} came"
        )
    return data


def _apart(values: Tensor, info: reference_pb2.HeadInfo) -> tuple[Tensor, Tensor | None]:
    """Weight and bias.

    Raises:
        ModelError: the size is not that of the announced shape.
    """
    weights = info.vocab_size * info.hidden_size
    if len(values) != weights + info.has_bias * info.vocab_size:
        raise ModelError(
            f"ppo.reference: {len(values)} numbers are no output layer of shape [{info.vocab_size}, {info.hidden_size}]"
        )
    bias = values[weights:] if info.has_bias else None
    return values[:weights].view(info.vocab_size, info.hidden_size), bias
