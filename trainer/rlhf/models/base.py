"""The model that adapters are for, beside whoever runs it with one merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import ModelError
from rlhf.models.adapters import merge_into
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.weights import AdapterOf


class Base:
    """
    Args:
        sha256: of the folder's weights.
    """

    def __init__(self, folder: Path, sha256: str) -> None:
        self.folder = folder
        self.sha256 = sha256
        self._model: PreTrainedModel | None = None

    def merge_into(self, model: nn.Module, tensors: Mapping[str, Tensor], adapter: AdapterOf) -> None:
        """Gives the model the weights of base and adapter together, computed in float32, as the trainer holds them.

        Raises:
            ModelError: the adapter is for another base, or the folder holds another by now. The model stays as it is.
        """
        if adapter.base_sha256 != self.sha256:
            raise ModelError(
                f"the adapter is for the model with sha256 {adapter.base_sha256[:12]}, and the one in {self.folder} "
                f"has {self.sha256[:12]}; trainer and policy must start from one model (ppo.model, policy.model)"
            )
        if self._model is None:
            self._model = self._load()
        merge_into(model, self._model, tensors, adapter.scaling)

    def _load(self) -> PreTrainedModel:
        """At the first adapter, and then kept: what runs has been given other weights by then."""
        if weights_sha256(self.folder) != self.sha256:
            raise ModelError(f"{self.folder}: was changed since its model was loaded; start again on what it holds now")
        return load_causal_lm(self.folder)
