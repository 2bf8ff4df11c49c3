"""New weights for every policy replica, in two phases; `rlhf.policy.weights` is the other side.

    write folder ─▶ Prepare on every live replica ─▶ `current` in Redis ─▶ Commit on every replica
    (fsync, rename)  (verifies, loads beside)         (compare-and-set)    (switches between decode steps)

The pointer in Redis is the truth. A replica that fails here catches up from it, or reports not ready.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from transformers import PreTrainedModel

from rlhf.errors import StageFailed, TransientError, WeightsMismatch
from rlhf.models.weights import write_weights
from rlhf.ppo.settings import PpoSettings
from rlhf.queues.registry import Registry, Replica
from rlhf.serving.client import call_sync, connect_sync
from rlhf.v1 import weights_pb2, weights_pb2_grpc
from rlhf.wire.messages import from_version, to_version
from rlhf.wire.records import WeightVersion

log = logging.getLogger(__name__)


class Publisher:
    """
    Args:
        folder: where versions lie, one folder `<epoch>-<step>` each; every replica must see it under the same path.
    """

    def __init__(self, registry: Registry, folder: Path, tokenizer_sha256: str, settings: PpoSettings) -> None:
        self.registry = registry
        self.folder = folder.absolute()
        self.tokenizer_sha256 = tokenizer_sha256
        self.settings = settings
        self.held: Mapping[str, WeightVersion] = {}
        """By replica's name, what it said to hold after the newest publish; of those that answered."""
        self._newest: WeightVersion | None = None
        self._channels: dict[str, grpc.Channel] = {}

    def publish(self, policy: PreTrainedModel, run_id: str, epoch: int, step: int) -> WeightVersion:
        """
        Raises:
            StorageError: the folder cannot be written.
            StageFailed: another trainer has moved the pointer.
            RlhfError: a replica refuses the weights, which trying again would not change.
        """
        folder = self.folder / f"{epoch}-{step}"
        version = write_weights(
            folder,
            policy,
            run_id=run_id,
            epoch=epoch,
            step=step,
            tokenizer_sha256=self.tokenizer_sha256,
            parent=self._newest,
        )
        uri = folder.as_uri()
        current = self.registry.current()
        replicas = self.registry.replicas()
        with ThreadPoolExecutor(max_workers=16) as pool:
            done = pool.map(lambda replica: self._prepare(replica, version, uri), replicas)
            prepared = [replica for replica, success in zip(replicas, done, strict=True) if success]
        if not self.registry.advance(version, uri, current.version if current else None):
            raise StageFailed(f"{version} was not made current: another trainer of this run published in between")
        with ThreadPoolExecutor(max_workers=16) as pool:
            list(pool.map(lambda replica: self._commit(replica, version), prepared))
            held = list(pool.map(self._current, replicas))
        self.held = {replica.name: found for replica, found in zip(replicas, held, strict=True) if found is not None}
        self._newest = version
        return version

    @property
    def version(self) -> WeightVersion:
        """The newest published weights."""
        assert self._newest is not None, "the source starts after the first publish"
        return self._newest

    def channels(self) -> dict[str, grpc.Channel]:
        """To every live replica, by its name."""
        return {replica.name: self._channel(replica) for replica in self.registry.replicas()}

    def newest_epoch(self) -> int:
        """Of all versions in the folder; -1 where there are none."""
        return max((epoch for epoch, _ in self._versions()), default=-1)

    def remove_old(self, checkpointed: Iterable[tuple[int, int]]) -> None:
        """Delete versions beyond the newest few, but none that a replica or a checkpoint (epoch, step) holds."""
        held = {(r.version.epoch, r.version.step) for r in self.registry.replicas() if r.version} | set(checkpointed)
        for epoch, step in self._versions()[: -self.settings.keep_weights]:
            if (epoch, step) not in held:
                shutil.rmtree(self.folder / f"{epoch}-{step}")

    def _versions(self) -> list[tuple[int, int]]:
        """(epoch, step), oldest first."""
        if not self.folder.is_dir():
            return []
        names = (folder.name.split("-") for folder in self.folder.iterdir() if not folder.name.startswith("."))
        return sorted((int(epoch), int(step)) for epoch, step in names)

    def _prepare(self, replica: Replica, version: WeightVersion, uri: str) -> bool:
        request = weights_pb2.PrepareRequest(version=to_version(version), uri=uri)
        try:
            call_sync(self._stub(replica).Prepare, request, timeout_s=self.settings.publish_timeout_s)
        except TransientError as error:
            log.warning("%s did not prepare %s: %s", replica.name, version, error)
            return False
        return True

    def _commit(self, replica: Replica, version: WeightVersion) -> None:
        request = weights_pb2.CommitRequest(version=to_version(version))
        try:
            call_sync(self._stub(replica).Commit, request, timeout_s=self.settings.publish_timeout_s)
        except (TransientError, WeightsMismatch) as error:
            log.warning("%s did not commit %s: %s", replica.name, version, error)

    def _current(self, replica: Replica) -> WeightVersion | None:
        """None: it is away, which is no statement about its weights."""
        request = weights_pb2.CurrentRequest()
        try:
            answer = call_sync(self._stub(replica).Current, request, timeout_s=self.settings.publish_timeout_s)
        except TransientError as error:
            log.warning("%s does not say which weights it holds: %s", replica.name, error)
            return None
        return from_version(answer.current)

    def _stub(self, replica: Replica) -> weights_pb2_grpc.WeightsServiceStub:
        return weights_pb2_grpc.WeightsServiceStub(self._channel(replica))

    def _channel(self, replica: Replica) -> grpc.Channel:
        if replica.address not in self._channels:
            self._channels[replica.address] = connect_sync(
                replica.address, token_file=self.settings.token_file, tls_ca=self.settings.tls_ca
            )
        return self._channels[replica.address]
