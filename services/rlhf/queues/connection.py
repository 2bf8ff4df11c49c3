"""How a process reaches Redis, and how it bears with a Redis that is away.

redis-py's own retries are off: it would send any command again, XADD included, and so double entries (redis-py 3554).
Retrying is `patiently`'s, around calls that may be repeated. BLOCK stays far below the socket timeout, because a
blocking read that outlasts it looks like a dead server.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from rlhf.errors import NotAuthorized, RedisUnsuitable, SettingsError, Unavailable
from rlhf.queues.settings import RedisSettings
from rlhf.settings.run import Settings

log = logging.getLogger(__name__)

SOCKET_TIMEOUT_S = 10.0
MAX_BLOCK_S = 0.5
"""Longest single blocking command: how soon a waiting consumer notices that it should stop."""
OLDEST_SERVER = (6, 2)
EMBEDDED = "embedded://"
_SAY_EVERY_S = 5.0
_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError)
_AWAY_REPLIES = ("MISCONF", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "LOADING", "NOREPLICAS")

T = TypeVar("T")


def connect(settings: Settings) -> redis.Redis:
    """A client of the run's Redis, safe to share between threads, after the server has answered and is suitable.

    Raises:
        RedisUnsuitable: too old, evicting, or without append-only file.
        NotAuthorized: the password is missing or wrong.
        Unavailable: no answer within `redis.connect_timeout_s`.
        SettingsError: the URL or the password file is no good.
    """
    deadline = time.monotonic() + settings.redis.connect_timeout_s
    url = settings.redis.url
    if url == EMBEDDED:
        url = _embedded_url(settings.paths.redis, deadline, settings.redis.connect_timeout_s)
    client = open_client(url, settings.redis)
    info = patiently(
        lambda: _info(client),
        timeout_s=max(0.1, deadline - time.monotonic()),
        what=f"Redis at {without_password(url)}",
    )
    check_suitable(info, settings.redis, without_password(url))
    return client


def open_client(url: str, settings: RedisSettings) -> redis.Redis:
    """A client of `url` that has not connected yet. It answers in bytes and never sends a command twice by itself."""
    try:
        return redis.Redis.from_url(
            url,
            **_password(settings),
            protocol=2,
            decode_responses=False,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            health_check_interval=15,
        )
    except ValueError as error:
        raise SettingsError(f"redis.url: {error}; received {without_password(url)!r}") from error


def check_suitable(info: dict[str, object], settings: RedisSettings, where: str) -> None:
    """
    Args:
        info: the reply to INFO.

    Raises:
        RedisUnsuitable: with a sentence that says what to set.
    """
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        raise RedisUnsuitable(f"{where} is Redis {version}; 6.2 or newer is needed (XAUTOCLAIM), so upgrade the server")
    for trouble in _would_lose(info):
        if settings.require_durable:
            raise RedisUnsuitable(
                f"{where} {trouble}, or set redis.require_durable = false to accept that rollouts may be lost"
            )
        log.warning("%s %s; redis.require_durable is false, so this run goes on", where, trouble)


def patiently(
    call: Callable[[], T],
    *,
    timeout_s: float,
    what: str,
    on_error: Callable[[], None] | None = None,
    stop: threading.Event | None = None,
) -> T:
    """The result of `call`, which may be run several times: again while Redis is away or still loads its data.

    Args:
        timeout_s: how long Redis may be away, counted from the first failure.
        what: what is being talked to, for log and error.
        on_error: runs after each failed attempt.
        stop: gives up at once when set.

    Raises:
        Unavailable: Redis was away for `timeout_s`, or `stop` was set meanwhile.
        NotAuthorized: the password is missing or wrong, or the user may not run a command.
    """
    began, said = 0.0, float("-inf")
    pause_s = 0.05
    while True:
        try:
            result = call()
        except redis.RedisError as error:
            reason = _away_reason(error, what)
            now = time.monotonic()
            began = began or now
            if on_error is not None:
                on_error()
            if now - began >= timeout_s or (stop is not None and stop.is_set()):
                raise Unavailable(
                    f"{what} has not answered for {now - began:.1f} s ({reason}); see that it runs and is reachable"
                ) from error
            if now - said >= _SAY_EVERY_S:
                said = now
                log.warning("%s is away (%s); trying again for up to %.0f s", what, reason, timeout_s - (now - began))
            _pause(min(pause_s * random.uniform(0.5, 1.5), timeout_s), stop)
            pause_s = min(pause_s * 2, 1.0)
        else:
            if began:
                log.info("%s is back after %.1f s", what, time.monotonic() - began)
            return result


def without_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _pause(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    else:
        stop.wait(seconds)


def _away_reason(error: redis.RedisError, what: str) -> str:
    """Why Redis counts as away. Raises what is no absence: wrong password, a bug of ours."""
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
        raise NotAuthorized(f"{what} refuses the password ({error}); set redis.password_file or redis.url") from error
    if isinstance(error, redis.exceptions.NoPermissionError):
        raise NotAuthorized(f"{what} does not let this user do that ({error}); grant the command") from error
    text = str(error)
    if isinstance(error, _AWAY) or any(reply in text for reply in _AWAY_REPLIES):
        return text or type(error).__name__
    raise error


def _info(client: redis.Redis) -> dict[str, object]:
    client.ping()  # INFO is answered while the append-only file is still loading, PING is not
    return dict(client.info())


def _would_lose(info: dict[str, object]) -> list[str]:
    """What about a server would lose acknowledged entries, each with its remedy."""
    troubles = []
    policy = info.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        troubles.append(
            f"has the eviction policy {policy} and would drop rollouts when memory is short; "
            "set `maxmemory-policy noeviction`"
        )
    if str(info.get("aof_enabled", "unknown")) != "1":
        troubles.append("keeps no append-only file and would lose rollouts when it restarts; set `appendonly yes`")
    return troubles


def _password(settings: RedisSettings) -> dict[str, str]:
    if not settings.password_file:
        return {}
    try:
        return {"password": Path(settings.password_file).read_text().strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"redis.password_file: {error}") from error


def _embedded_url(folder: Path, deadline: float, timeout_s: float) -> str:
    """The address that the supervisor's EmbeddedRedis left, waited for until the deadline."""
    path = folder / "address.json"
    said = float("-inf")
    while True:
        try:
            return str(json.loads(path.read_text())["url"])
        except FileNotFoundError:
            now = time.monotonic()
        if now >= deadline:
            raise Unavailable(
                f"no embedded Redis runs for this run: {path} did not appear within {timeout_s:.0f} s; "
                "start `rlhf run`, or set redis.url to a server"
            )
        if now - said >= _SAY_EVERY_S:
            said = now
            log.info("waiting for the embedded Redis: %s is not there yet", path)
        time.sleep(0.1)
