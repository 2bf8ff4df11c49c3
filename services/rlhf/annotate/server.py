"""`rlhf annotate`: opens the database, adds what is to be ranked, and serves the page until it is stopped."""

from __future__ import annotations

import errno
import ipaddress
import logging
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from rlhf.annotate import guidelines
from rlhf.annotate.accounts import has_lead, invite
from rlhf.annotate.app import create_app
from rlhf.annotate.settings import AnnotateSettings
from rlhf.annotate.store import Store, open_store
from rlhf.annotate.tasks import Task
from rlhf.annotate.web import Site
from rlhf.data.samples import Sampled, read_samples
from rlhf.errors import MachineError, PortInUse, SettingsError
from rlhf.feedback.judgments import CompletionShown, write_judgments
from rlhf.settings.run import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """
    Raises:
        SettingsError: it would listen beyond loopback without TLS, or a file cannot be read.
        PortInUse, StorageError, Unavailable: the port or the database cannot be had.
    """
    refuse_open_listening(settings.annotate)
    store = open_store(settings)
    try:
        if settings.annotate.export:
            count = write_judgments(settings.annotate.export, store.judgments())
            print(f"{count} judgments in {settings.annotate.export}")
        elif settings.annotate.invite:
            print(_link_of_a_server_elsewhere(settings.annotate, store))
        else:
            serve(settings, store)
    finally:
        store.close()


def serve(settings: Settings, store: Store) -> None:
    """Until SIGTERM or SIGINT; requests in flight are finished."""
    its = settings.annotate
    _prepare(settings, store)
    listening = _bound(its)
    site = Site(store, its, _address(its, listening.getsockname()[1]))
    if not has_lead(store.database):
        print(f"no lead yet; this link makes the first account, once: {_invite_link(site, 'lead')}", flush=True)
    config = uvicorn.Config(
        create_app(site),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
        ssl_certfile=its.tls_cert,
        ssl_keyfile=its.tls_key,
    )
    print(f"annotate listening on {site.url}", flush=True)
    server = uvicorn.Server(config)

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn drains, and then raises the signal once more; being stopped is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server.run([listening])


def refuse_open_listening(its: AnnotateSettings) -> None:
    """
    Raises:
        SettingsError: beyond loopback without TLS and without being told to, or a certificate without its key.
    """
    if (its.tls_cert is None) != (its.tls_key is None):
        raise SettingsError("annotate: tls_cert and tls_key belong together; one of them is missing")
    for path in (its.tls_cert, its.tls_key):
        if path is not None and not path.is_file():
            raise SettingsError(f"annotate: there is no file {path}")
    if not (_is_loopback(its.host) or its.tls_cert or its.plain_http):
        raise SettingsError(
            f"annotate.host: {its.host} can be reached from other machines, and passwords would travel in the clear; "
            "give tls_cert and tls_key, set plain_http where a proxy adds TLS, or listen on 127.0.0.1"
        )


def tasks_from_samples(samples: list[Sampled], its: AnnotateSettings) -> Iterator[Task]:
    """What to ask about sampled completions. A seeded share of them is asked of one person more."""
    overlapping = random.Random(0)
    for sampled in samples:
        need = its.need + (overlapping.random() < its.overlap)
        shown = tuple(
            CompletionShown(
                each.text,
                id=f"{sampled.prompt_index}.{place}",
                policy_version=str(sampled.version),
                sampling={"temperature": sampled.sampling.temperature, "seed": each.seed},
            )
            for place, each in enumerate(sampled.completions)
        )
        yield Task(sampled.prompt, shown, kind=its.kind, need=need, p_select=1.0, metadata=sampled.metadata)


def _prepare(settings: Settings, store: Store) -> None:
    its, now = settings.annotate, time.time()
    guidelines.publish(store.database, guidelines.BUILT_IN, 0.0)
    if its.guidelines is not None:
        guidelines.publish(store.database, _text(its.guidelines), now)
    source = its.tasks or (settings.paths.samples if its.samples and settings.paths.samples.exists() else None)
    if source is not None:
        ids = store.add_tasks(tasks_from_samples(read_samples(source), its))
        log.info("%d tasks of %s", len(ids), source)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"annotate.guidelines: {path} cannot be read: {error}") from error


def _link_of_a_server_elsewhere(its: AnnotateSettings, store: Store) -> str:
    if its.port == 0 and not its.public_url:
        raise SettingsError("annotate.invite: with port 0 nobody knows where the page is; give port or public_url")
    return _invite_link(Site(store, its, _address(its, its.port)))


def _invite_link(site: Site, role: str = "") -> str:
    return f"{site.url}/join/{invite(site.database, role or site.settings.invite, time.time())}"


def _address(its: AnnotateSettings, port: int) -> str:
    host = f"[{its.host}]" if ":" in its.host else its.host
    return f"{'https' if its.tls_cert else 'http'}://{host}:{port}"


def _bound(its: AnnotateSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(its.host, its.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # Now, so that nobody is told an address that another process could still take.
        listening.listen(128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"annotate: port {its.port} on {its.host} is in use by another process; stop it, or set annotate.port"
            ) from error
        raise MachineError(f"annotate: cannot listen on {its.host}:{its.port}: {error.strerror or error}") from error
    return listening


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
