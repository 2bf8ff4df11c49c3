"""Ctrl-C, SIGTERM and a closed terminal, noticed between two looks instead of in the middle of a step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Counts the signals that ask this process to end while the block lasts. Only in the main thread."""

    def __init__(self) -> None:
        self.number = 0
        """The first that came; 0: none."""
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """
        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: another came; the code is 128 + its number, as shells report it.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            raise SystemExit(128 + self.number)

    def impatient(self) -> bool:
        """A second one came: whoever sent it does not want to wait."""
        return self.count > 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1
