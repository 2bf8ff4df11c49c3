"""What processes of a run know of each other through Redis: the weights pointer, policy replicas, status reports.

The pointer is the truth about which weights are current; a message that it moved only wakes who waits. Replicas and
reports are leased: who does not renew is gone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import redis

from rlhf.queues import scripts
from rlhf.queues.connection import MAX_BLOCK_S, patiently
from rlhf.queues.keys import RunKeys
from rlhf.queues.settings import RedisSettings
from rlhf.wire.records import WeightVersion

T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """A policy service, as it registers itself."""

    name: str
    address: str
    """host:port that its weights service answers on."""
    version: WeightVersion
    """The weights it generates with."""
    prepared: WeightVersion | None
    """The weights it holds beside them."""
    ready: bool


@dataclass(frozen=True)
class Current:
    """The weights that the run's policies should hold."""

    version: WeightVersion
    uri: str
    """Folder with model.safetensors and manifest.json."""


@dataclass(frozen=True)
class Beat:
    """What one process last said about itself."""

    service: str
    name: str
    fields: Mapping[str, Any]
    """As given to `beat`; JSON values."""
    age_s: float
    """By the clocks of writer and reader."""


class Registry:
    """Safe to share between threads. Every method bears with a Redis that is away, and raises Unavailable after
    `timeout_s` of that."""

    def __init__(
        self,
        client: redis.Redis,
        keys: RunKeys,
        lease_s: float,
        timeout_s: float = 60.0,
        beat_file: Path | None = None,
    ) -> None:
        self._client = client
        self._keys = keys
        self._lease_ms = round(lease_s * 1000)
        self._timeout_s = timeout_s
        self._beat_file = beat_file
        self._advance = client.register_script(scripts.ADVANCE)
        self._lease = client.register_script(scripts.LEASE)
        self._leased = client.register_script(scripts.LEASED)

    def register(self, replica: Replica) -> None:
        """Writes or renews a replica's registration; to be called several times per lease."""
        value = {
            "name": replica.name,
            "address": replica.address,
            "version": _version_json(replica.version),
            "prepared": None if replica.prepared is None else _version_json(replica.prepared),
            "ready": replica.ready,
        }
        self._write_leased(self._keys.replicas, self._keys.replica, replica.name, value)

    def unregister(self, name: str) -> None:
        """Ends a registration before its lease does, when a replica stops on purpose."""
        self._patiently(lambda: self._client.delete(self._keys.replica + name))

    def replicas(self) -> list[Replica]:
        """Those whose lease holds, by name."""
        found = self._read_leased(self._keys.replicas, self._keys.replica)
        return sorted((_as_replica(value) for value in found), key=lambda replica: replica.name)

    def current(self) -> Current | None:
        """None: nothing has been published in this run."""
        fields = cast(dict[bytes, bytes], self._patiently(lambda: self._client.hgetall(self._keys.current)))
        if not fields:
            return None
        texts = {name.decode(): value.decode() for name, value in fields.items()}
        uri = texts.pop("uri")
        version = WeightVersion(texts["run_id"], int(texts["epoch"]), int(texts["step"]), texts["sha256"])
        return Current(version, uri)

    def advance(self, version: WeightVersion, uri: str, expected: WeightVersion | None) -> bool:
        """Points `current` at `version`, if it points at `expected` (None: nowhere yet) and `version` is later, and
        wakes who waits. True also where it points at `version` already, so that a caller may ask again."""
        args: list[str | int] = [
            version.run_id,
            version.epoch,
            version.step,
            version.sha256,
            uri,
            _version_name(expected),
        ]
        return bool(self._patiently(lambda: self._advance([self._keys.current, self._keys.changed], args)))

    def wait_for_change(
        self, timeout_s: float, seen: Current | None = None, stop: threading.Event | None = None
    ) -> Current | None:
        """The pointer as soon as it is another than `seen`, or as it is after `timeout_s`, or soon after `stop`."""
        deadline = time.monotonic() + timeout_s
        stop = stop or threading.Event()
        return self._patiently(lambda: self._wait_for_change(deadline, seen, stop), stop)

    def pause(self, holder: str, reason: str) -> None:
        """Holds the trainer before its next step, until `resume`; survives everybody's restarts."""
        self._patiently(lambda: self._client.hset(self._keys.paused, holder, reason))

    def resume(self, holder: str) -> bool:
        """Lifts one holder's pause; whether there was one."""
        return bool(self._patiently(lambda: self._client.hdel(self._keys.paused, holder)))

    def paused(self) -> dict[str, str]:
        """Why, by holder; empty: the trainer may go on."""
        found = cast(dict[bytes, bytes], self._patiently(lambda: self._client.hgetall(self._keys.paused)))
        return {holder.decode(): reason.decode() for holder, reason in sorted(found.items())}

    def beat(self, service: str, name: str, fields: Mapping[str, Any]) -> None:
        """Reports the state of one process, for `rlhf status` and `redis.beat_file`; to be called several times per
        lease."""
        value = {"service": service, "name": name, "fields": dict(fields), "unix_s": time.time()}
        self._write_leased(self._keys.beats, self._keys.beat, f"{service}/{name}", value)
        if self._beat_file is not None:
            self._beat_file.touch()

    def beats(self) -> list[Beat]:
        """Of the processes that have reported within the lease, by service and name."""
        now = time.time()
        found = self._read_leased(self._keys.beats, self._keys.beat)
        beats = [Beat(b["service"], b["name"], b["fields"], max(0.0, now - b["unix_s"])) for b in found]
        return sorted(beats, key=lambda beat: (beat.service, beat.name))

    def _wait_for_change(self, deadline: float, seen: Current | None, stop: threading.Event) -> Current | None:
        with self._client.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
            channel.subscribe(self._keys.changed)  # before the look, so that no change falls between
            while True:
                found = self.current()
                left_s = deadline - time.monotonic()
                if found != seen or left_s <= 0 or stop.is_set():
                    return found
                channel.get_message(timeout=min(left_s, MAX_BLOCK_S))

    def _write_leased(self, names: str, prefix: str, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value)
        self._patiently(lambda: self._lease([names, prefix + name], [name, text, self._lease_ms]))

    def _read_leased(self, names: str, prefix: str) -> list[Any]:
        return [json.loads(value) for value in self._patiently(lambda: self._leased([names], [prefix]))]

    def _patiently(self, call: Callable[[], T], stop: threading.Event | None = None) -> T:
        return patiently(call, timeout_s=self._timeout_s, what="Redis", stop=stop)


def open_registry(client: redis.Redis, run: str, settings: RedisSettings) -> Registry:
    return Registry(client, RunKeys(run), settings.lease_s, settings.connect_timeout_s, settings.beat_file)


def _version_name(version: WeightVersion | None) -> str:
    return "" if version is None else f"{version.run_id}/{version.epoch}/{version.step}/{version.sha256}"


def _version_json(version: WeightVersion) -> list[str | int]:
    return [version.run_id, version.epoch, version.step, version.sha256]


def _as_replica(value: Mapping[str, Any]) -> Replica:
    prepared = value["prepared"]
    return Replica(
        name=value["name"],
        address=value["address"],
        version=WeightVersion(*value["version"]),
        prepared=None if prepared is None else WeightVersion(*prepared),
        ready=value["ready"],
    )
