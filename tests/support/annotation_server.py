"""A web server of the annotation page in a process of its own, which tests may kill and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class AnnotationServer:
    """`rlhf annotate` with these settings."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.port = free_port()
        self.settings = {"port": self.port, **settings}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        given = [part for name, value in self.settings.items() for part in ("--set", f"annotate.{name}={value}")]
        command = [sys.executable, "-m", "rlhf.cli.main", "annotate", *given, "--set", f"run.folder={self.folder}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with (self.folder / f"server-{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait_until_open(self) -> None:
        deadline = time.monotonic() + 60
        while not is_open(self.port):
            assert time.monotonic() < deadline, (self.folder / f"server-{self.port}.log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / f"server-{self.port}.log").read_text()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """Its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)
