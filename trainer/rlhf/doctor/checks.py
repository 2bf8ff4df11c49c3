"""`rlhf doctor`: is everything in place? One line a check, with a remedy where something is wrong.

Services that nobody has started are no problem, unless the settings name an address for them.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.requirements import Requirement

from rlhf.doctor.findings import Finding, telling
from rlhf.doctor.models import check_tokens
from rlhf.doctor.services import check_services
from rlhf.errors import MachineError
from rlhf.observe.status import PATIENCE_S, supervised
from rlhf.queues.connection import EMBEDDED, connect
from rlhf.settings import Listen
from rlhf.settings.run import Settings
from rlhf.supervisor.embedded_redis import find_server
from rlhf.supervisor.lock import embedded_redis_runs

DISTRIBUTION = "rlhf-services"
MIN_FREE_GIB = 2.0


def run(settings: Settings) -> None:
    """Prints every finding.

    Raises:
        MachineError: something is wrong.
    """
    problems = []
    for check in CHECKS:
        for finding in telling(check.__name__.removeprefix("check_"), check(settings)):
            print(finding, flush=True)
            problems += [] if finding.ok else [finding]
    if problems:
        raise MachineError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; the first: {problems[0].what}")


def check_packages(settings: Settings) -> Iterator[Finding]:
    """Installed versions against the ranges that this distribution was built with."""
    misfits = [_misfit(Requirement(text)) for text in metadata.requires(DISTRIBUTION) or []]
    wrong = [misfit for misfit in misfits if misfit]
    fine = f"versions are those that {DISTRIBUTION} {metadata.version(DISTRIBUTION)} asks for"
    yield Finding("packages", not wrong, ", ".join(wrong) or fine, "run `make setup`")


def check_redis(settings: Settings) -> Iterator[Finding]:
    if settings.redis.url == EMBEDDED and not embedded_redis_runs(settings.paths):
        server = find_server()
        version = ".".join(map(str, server.version))
        yield Finding("redis", True, f"`rlhf run` will start {server.path}, version {version}")
        return
    patience_s = min(PATIENCE_S, settings.redis.connect_timeout_s)
    redis = settings.redis.model_copy(update={"connect_timeout_s": patience_s})
    client = connect(settings.model_copy(update={"redis": redis}))
    version = dict(client.info("server"))["redis_version"]
    yield Finding("redis", True, f"version {version} answers, keeps an append-only file and evicts nothing")


def check_disk(settings: Settings) -> Iterator[Finding]:
    place = settings.paths.folder.absolute()
    while not place.exists():
        place = place.parent
    free_gib = shutil.disk_usage(place).free / 2**30
    remedy = f"make room, {MIN_FREE_GIB:g} GiB at least, or set run.folder"
    yield Finding("disk", free_gib >= MIN_FREE_GIB, f"{free_gib:.1f} GiB are free under {place}", remedy)


def check_ports(settings: Settings) -> Iterator[Finding]:
    """Those that the settings fix; a run that is under way holds its own."""
    if supervised(settings.paths):
        return
    listens: dict[str, Listen] = {
        "policy": settings.policy,
        "reward": settings.reward,
        "reference": settings.reference,
    }
    for name, listen in listens.items():
        if listen.port:
            free = _can_bind(listen.host, listen.port)
            what = f"{listen.host}:{listen.port} is {'free' if free else 'in use'}"
            yield Finding("port", free, f"{name}: {what}", f"stop who listens there, or set {name}.port")


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    check_packages,
    check_redis,
    check_disk,
    check_ports,
    check_tokens,
    check_services,
)


def _misfit(requirement: Requirement) -> str:
    """`torch 2.1.0 is not >=2.11`; empty: it fits, or is not for this machine."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return ""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}"


def _can_bind(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the servers do: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
