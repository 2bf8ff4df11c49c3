"""Logging of every process: one line an event, `time level service message`, to stderr.

The supervisor copies a process's stderr to its log file; nothing here opens files.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s {service} %(message)s"
QUIET = ("alembic", "filelock", "fsspec", "httpx", "matplotlib", "PIL", "urllib3", "uvicorn")
"""Libraries that log every step of theirs at INFO."""


class OneLine(logging.Formatter):
    """Joins a message's lines with `⏎`, so that one event stays one line; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.rstrip().replace("\n", " ⏎ ")
        return super().formatMessage(record)


class Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time, so that lines appear above a progress bar and not inside it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(service: str, level: int = logging.INFO, file: Path | None = None) -> None:
    """Sends the records of this process to stderr as `time level service message`. Calling it again starts anew.

    Use `logging.getLogger(__name__)` to write them. `file` gets a copy, after what it already holds.
    """
    handlers: list[logging.Handler] = [Stderr()]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(OneLine(FORMAT.format(service=service.replace("%", "%%")), datefmt="%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level, handlers=handlers, force=True)
    logging.captureWarnings(True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
