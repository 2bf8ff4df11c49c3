"""Tells Redis every second or so what the trainer is doing, for `rlhf status`; also while a long step runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.errors import Unavailable
from rlhf.queues.registry import Registry

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Heartbeat:
    """
    Args:
        describe: answers what to tell; called from the heartbeat's own thread.
    """

    def __init__(self, registry: Registry, service: str, name: str, describe: Callable[[], Mapping[str, Any]]) -> None:
        self.registry = registry
        self.service = service
        self.name = name
        self.describe = describe
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.registry.beat(self.service, self.name, self.describe())
            except Unavailable as error:
                # Whoever needs Redis for its work reports the loss; a status can wait.
                log.debug("no heartbeat: %s", error)
            self._stopped.wait(PERIOD_S)
