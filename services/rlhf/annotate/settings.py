"""Settings of the annotation page."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf.settings import Section


class AnnotateSettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs `tls_cert` or `plain_http`."""
    port: int = Field(default=7104, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""
    tls_cert: Path | None = None
    """PEM file with the server's certificate chain."""
    tls_key: Path | None = None
    """PEM file with the server's private key."""
    plain_http: bool = False
    """Listen beyond loopback without TLS: behind a proxy that adds it, or on a network that nobody else shares."""
    public_url: str = ""
    """Where people reach the page, such as https://rank.example.org, for the links it prints. Cookies are sent over
    TLS only if this begins with https. Empty: host and port."""
    database: str = ""
    """SQLAlchemy URL, such as postgresql+psycopg://user@host/name. Empty: SQLite, annotate.db in the run's folder."""
    tasks: Path | None = None
    """JSONL of completions to rank, as `rlhf sample` writes it. None: the run's samples, where there are any."""
    samples: bool = True
    """Ask about the run's samples, where `tasks` names no others. `rlhf run` turns it off for rounds of feedback, which
    bring their own tasks."""
    need: PositiveInt = 1
    """How many people rank each of these."""
    overlap: float = Field(default=0.2, ge=0, le=1)
    """Share of these that one person more ranks, to see how far people agree."""
    kind: Literal["rank", "pair", "best-worst"] = "rank"
    """How they are asked about: all ranked; of two, which is better and how much; or the best and the worst of them."""
    guidelines: Path | None = None
    """Text file of guidelines. None: a short built-in text, until the lead writes another."""
    lease_s: PositiveFloat = 1800.0
    """Seconds for which a task is kept for the person who has it open; then it goes to whoever asks first."""
    repeat_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the tasks that a person has ranked before, in another order: do they agree with themselves?"""
    repeat_gap: PositiveInt = 50
    """Tasks in between, at least."""
    gold_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the tasks whose ranking the lead has settled. They look like all others."""
    session_hours: PositiveFloat = 72.0
    """Hours until a person has to log in again."""
    login_failures: PositiveInt = 8
    """Wrong passwords within 15 minutes for one name, after which it has to wait; four times as many from one host."""
    submits_per_minute: PositiveInt = 60
    """Answers that one person may submit in a minute."""
    invite: Literal["", "annotator", "lead"] = ""
    """Print a link with which somebody makes an account of this kind, and end."""
    export: Path | None = None
    """Write every judgment to this file (.jsonl, .jsonl.gz or .parquet), and end."""
