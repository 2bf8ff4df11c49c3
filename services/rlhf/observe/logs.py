"""Logging of every process: one line an event, `time level service message`, to stderr.

The supervisor copies a process's stderr to its log file; nothing here opens files.
"""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s {service} %(message)s"
QUIET = ("filelock", "fsspec", "httpx", "matplotlib", "PIL", "urllib3")
"""Libraries that log every step of theirs at INFO."""


class OneLine(logging.Formatter):
    """Joins a message's lines with `⏎`, so that one event stays one line; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.rstrip().replace("\n", " ⏎ ")
        return super().formatMessage(record)


def configure_logging(service: str, level: int = logging.INFO) -> None:
    """Sends the records of this process to stderr as `time level service message`. Calling it again replaces the name.

    Use `logging.getLogger(__name__)` to write them.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(FORMAT.format(service=service.replace("%", "%%")), datefmt="%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
