"""A proxy in front of Redis' Unix socket that misbehaves on request: it loses replies, cuts connections, or answers
that the server is still loading."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_LOADING = b"-LOADING Redis is loading the dataset in memory\r\n"


class Proxy:
    """Listens at `url`, forwards to `target`. Use as a context manager."""

    def __init__(self, target_url: str, folder: Path) -> None:
        self._target = target_url.removeprefix("unix://")
        self._path = str(folder / "proxy.sock")
        self.url = f"unix://{self._path}"
        self.lost = 0
        """Replies that were swallowed."""
        self.loading = False
        """Answers every command so, in place of the server."""
        self._lose: list[bytes] = []
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Proxy:
        self._listener.bind(self._path)
        self._listener.listen()
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def lose_reply_of(self, command: bytes, times: int = 1) -> None:
        """The server runs the next commands that contain these bytes; the client never hears of it."""
        with self._lock:
            self._lose += [command] * times

    def cut(self) -> None:
        """Ends all connections."""
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:
                client.close()
                server.close()
                continue
            with self._lock:
                self._sockets |= {client, server}
            losing = threading.Event()
            self._spawn(self._to_server, client, server, losing)
            self._spawn(self._to_client, client, server, losing)

    def _to_server(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        for data in _chunks(client):
            if self.loading:
                client.sendall(_LOADING * data.count(b"*"))
                continue
            with self._lock:
                wanted = next((command for command in self._lose if command in data), None)
                if wanted is not None:
                    self._lose.remove(wanted)
                    losing.set()
            with suppress(OSError):
                server.sendall(data)
        self._end(client, server)

    def _to_client(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        for data in _chunks(server):
            if losing.is_set():
                self.lost += 1
                break
            with suppress(OSError):
                client.sendall(data)
        self._end(client, server)

    def _end(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            with self._lock:
                self._sockets.discard(each)


def _chunks(source: socket.socket):  # type: ignore[no-untyped-def]
    while True:
        try:
            data = source.recv(65536)
        except OSError:
            return
        if not data:
            return
        yield data
