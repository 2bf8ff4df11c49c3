"""The doctor's questions to policy, reward and reference: are they ready, and do they speak of the same models?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from rlhf.doctor.findings import Finding, telling
from rlhf.doctor.models import check_logprobs, check_reward
from rlhf.errors import InputError
from rlhf.models.folders import sha256_file, start_model
from rlhf.observe.status import look, supervised
from rlhf.queues.registry import Current
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.serving.client import call_sync, connect_sync
from rlhf.settings.run import Settings
from rlhf.supervisor.group import SERVICES
from rlhf.supervisor.health import is_serving
from rlhf.v1 import policy_pb2, policy_pb2_grpc, reference_pb2, reference_pb2_grpc, reward_pb2, reward_pb2_grpc
from rlhf.wire.messages import from_version
from rlhf.wire.records import WeightVersion

TIMEOUT_S = 3.0
_INFO: dict[str, tuple[Any, Any]] = {
    "policy": (policy_pb2_grpc.PolicyServiceStub, policy_pb2.PolicyInfoRequest),
    "reward": (reward_pb2_grpc.RewardServiceStub, reward_pb2.RewardInfoRequest),
    "reference": (reference_pb2_grpc.ReferenceServiceStub, reference_pb2.ReferenceInfoRequest),
}


@dataclass
class Asked:
    """What the services that answer say of themselves."""

    policies: dict[str, policy_pb2.PolicyInfoResponse] = field(default_factory=dict)
    """By name of the replica."""
    addresses: dict[str, str] = field(default_factory=dict)
    """By name of the service."""
    reward: reward_pb2.RewardInfoResponse | None = None
    reward_address: str | None = None
    reference: reference_pb2.ReferenceInfoResponse | None = None


def check_services(settings: Settings) -> Iterator[Finding]:
    asked = Asked()
    for name, section, address, expected in addresses(settings):
        ready = is_serving(address, SERVICES[section], tls_ca=settings.rollouts.tls_ca, timeout_s=TIMEOUT_S)
        if ready:
            yield Finding("service", True, f"{name} at {address} is ready")
            _ask(asked, name, section, address, settings)
        elif expected:
            yield Finding("service", False, f"{name} at {address} is not ready", f"see its log, or rlhf {section}")
        else:
            yield Finding("service", True, f"{name} is not running; nobody expects it to")
    yield from check_tokenizers(asked)
    yield from _check_reference(asked, settings)
    yield from _check_weights(asked, settings)
    policies = {name: asked.addresses[name] for name in asked.policies}
    current = _current(settings) if policies else None
    yield from telling("log-probs", check_logprobs(settings, policies, current))
    yield from telling("reward", check_reward(settings, asked.reward_address))


def addresses(settings: Settings) -> Iterator[tuple[str, str, str, bool]]:
    """Name, section, address, and whether it must be there: those of a run under way, else those a worker would use."""
    running = [(p["name"], p["address"]) for p in supervised(settings.paths) if p["address"]]
    for section in SERVICES:
        mine = [(name, section, at, True) for name, at in running if name.partition("-")[0] == section]
        if mine:
            yield from mine
            continue
        address = getattr(settings.rollouts, section)
        expected = address != getattr(RolloutsSettings(), section)
        for part in address.split(","):
            yield (section, section, part.strip(), expected)


def check_tokenizers(asked: Asked) -> Iterator[Finding]:
    """Tokens travel between policy and reference as they are; a reward model may have another tokenizer and reads
    texts then."""
    hashes = {name: info.tokenizer_sha256 for name, info in asked.policies.items()}
    if asked.reference is not None:
        hashes["reference"] = asked.reference.tokenizer_sha256
    if not hashes:
        return
    told = ", ".join(f"{name} {sha[:8]}" for name, sha in hashes.items())
    same = len(set(hashes.values())) == 1
    remedy = "let the services load models with one tokenizer (policy.model, reference.model)"
    yield Finding("tokenizer", same, told, remedy)
    reward = "" if asked.reward is None else asked.reward.tokenizer_sha256
    if reward and same:
        note = "is the policy's" if reward in hashes.values() else f"is another, {reward[:8]}: it scores texts"
        yield Finding("tokenizer", True, f"the reward model's {note}")


def _check_reference(asked: Asked, settings: Settings) -> Iterator[Finding]:
    if asked.reference is None:
        return
    from rlhf.models.causal import weights_sha256  # imports torch, which takes seconds

    try:
        folder = settings.reference.model or start_model(settings)
        expected = weights_sha256(folder)
    except InputError as error:
        yield Finding("reference", False, f"what it should serve cannot be read: {error}")
        return
    same = asked.reference.model_sha256 == expected
    what = f"serves {asked.reference.model_sha256[:8]}, and {folder} is {expected[:8]}"
    yield Finding("reference", same, what, "start the reference service again")


def _check_weights(asked: Asked, settings: Settings) -> Iterator[Finding]:
    """Every replica holds the current version, and the file of that version is unaltered."""
    current = _current(settings) if asked.policies else None
    if current is None:
        return
    place, found = _published(current)
    while found != current.version.sha256 and (newer := _current(settings)) is not None and newer != current:
        current, (place, found) = newer, _published(newer)  # the trainer has removed the older one meanwhile
    what = f"current is {current.version}, and {place} is {found[:8]}"
    fine = found == current.version.sha256
    yield Finding("weights", fine, what, "restart the trainer: it publishes its weights again")
    for name in asked.policies:
        held, current_then = _held(asked.addresses[name], settings)
        remedy = f"current is {current_then}; see {name}'s log"
        yield Finding("weights", held == current_then, f"{name} holds {held}", remedy)


def _published(current: Current) -> tuple[Path, str]:
    """The file of a version, and its hash."""
    place = Path(url2pathname(urlsplit(current.uri).path)) / "model.safetensors"
    return place, sha256_file(place) if place.exists() else "missing"


def _held(address: str, settings: Settings) -> tuple[WeightVersion, WeightVersion | None]:
    """What a replica holds and what is current, asked again while the trainer may be between the two."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        held, current = from_version(_info("policy", address, settings).current), _current(settings)
        if current is None or held == current.version or time.monotonic() > deadline_s:
            return held, None if current is None else current.version
        time.sleep(0.1)


def _current(settings: Settings) -> Current | None:
    traffic = look(settings)
    return None if traffic is None else traffic.current


def _info(section: str, address: str, settings: Settings) -> Any:
    stub, request = _INFO[section]
    rollouts = settings.rollouts
    with connect_sync(address, token_file=rollouts.token_file, tls_ca=rollouts.tls_ca) as channel:
        return call_sync(stub(channel).Info, request(), timeout_s=TIMEOUT_S)


def _ask(asked: Asked, name: str, section: str, address: str, settings: Settings) -> None:
    answer = _info(section, address, settings)
    asked.addresses[name] = address
    if section == "policy":
        asked.policies[name] = answer
    elif section == "reward":
        asked.reward, asked.reward_address = answer, address
    else:
        asked.reference = answer
