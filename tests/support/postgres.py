"""A PostgreSQL server of a test's own, from Debian's package `postgresql`, on a Unix socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any

import psycopg


class Postgres:
    def __init__(self) -> None:
        self.bin = _binaries()
        # The server refuses to run as root; Debian's package made a user for it.
        self.as_user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a short path: sockets allow no long ones
        if self.as_user:
            shutil.chown(self.folder, "postgres")

    def start(self) -> None:
        self.run("initdb", "--auth=trust", "--username=postgres", "--no-sync", f"--pgdata={self.folder}/data")
        options = f"-k {self.folder} -c listen_addresses='' -c max_connections=200"
        self.run("pg_ctl", "start", "-w", f"-D{self.folder}/data", f"-l{self.folder}/log", "-o", options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-w", "-mimmediate", f"-D{self.folder}/data")
        shutil.rmtree(self.folder)

    def new_database(self) -> str:
        """Its URL."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(f"host={self.folder} user=postgres dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://postgres@/{name}?host={self.folder}"

    def run(self, program: str, *arguments: str) -> None:
        command = [self.bin / program, *arguments]
        done = subprocess.run(
            command, **self.as_user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


def _binaries() -> Path:
    """Debian keeps them off the PATH, one folder for each version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "there is no PostgreSQL: apt-get install postgresql"
    return found[-1].parent
