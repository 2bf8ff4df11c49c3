"""Settings of the connection to Redis and of the two streams."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf.settings import Section


class RedisSettings(Section):
    url: str = "embedded://"
    """redis://…, rediss://… or unix://… ; embedded:// is the server that `rlhf run` starts for the run."""
    password_file: str = ""
    """File with the password, where the URL holds none."""
    connect_timeout_s: PositiveFloat = 60.0
    """How long Redis may be away before a process gives up."""
    require_durable: bool = True
    """Refuse a server without append-only file or with an eviction policy: it would lose rollouts. A managed Redis
    whose INFO leaves out `aof_enabled` or `maxmemory_policy` needs `false`."""
    max_entries: PositiveInt = 4096
    """Entries in each stream; a producer waits while it is full."""
    max_mib: PositiveInt = 256
    """MiB in each stream; a producer waits while it is full."""
    dedupe_s: PositiveFloat = 172800.0
    """Seconds for which an id is remembered after it was enqueued."""
    max_attempts: PositiveInt = 3
    """Failures after which an entry goes to the dead letters."""
    max_dead_letters: PositiveInt = 1000
    """Dead letters kept; the oldest go first. Their count is kept in full."""
    reclaim_idle_s: PositiveFloat = 30.0
    """An entry that a consumer has held this long without renewing it goes to another consumer."""
    lease_s: float = Field(default=10.0, ge=1)
    """A policy replica that has not renewed its registration for this long counts as gone."""
    beat_file: Path | None = None
    """File that worker and trainer touch whenever Redis has taken their report, every second or so: its age tells a
    health check, for next to nothing, whether they are alive. None: none."""
