"""A reward model taken out of service for another while calls come in.

    rounds of feedback ── write ──▶ pointer file ◀── look ── reward service
                                                              │ load beside the model in service
                                                              │ change over between two calls
                                                              ▼ let go of the old one after its last call

The file is the truth: a service that restarts begins with the model that it names. A call keeps the model that it began
with, so a prompt's completions are scored by one, and each answer says by which.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf.errors import ModelError, RlhfError
from rlhf.models.folders import read_json, write_json
from rlhf.reward.requests import Call
from rlhf.reward.scorer import Scorer
from rlhf.reward.scores import About, Score
from rlhf.serving.worker_thread import WorkerThread

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pointer:
    """Which model is to be in service."""

    folder: str
    sha256: str
    """As `rlhf.models.ensemble.reward_sha256` has it, and as every score names it."""
    round: int
    """That made it."""


def read_pointer(path: Path) -> Pointer | None:
    """None: nothing is pointed at yet.

    Raises:
        ModelError: the file is there and says something else.
    """
    if not path.exists():
        return None
    try:
        return Pointer(**read_json(path))
    except TypeError as error:
        raise ModelError(f"{path} does not name a reward model: {error}") from error


def write_pointer(path: Path, pointer: Pointer) -> None:
    write_json(path, asdict(pointer))


@dataclass
class Loaded:
    """A scorer with the thread in which it runs."""

    scorer: Scorer
    worker: WorkerThread
    _running: AsyncExitStack = field(default_factory=AsyncExitStack)
    _calls: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def begin(self, on_failure: Callable[[BaseException], None]) -> None:
        await self._running.enter_async_context(self.scorer.batcher.running(on_failure))

    async def score(self, call: Call) -> list[Score]:
        self._calls += 1
        try:
            return await self.scorer.score(call)
        finally:
            self._calls -= 1
            self._idle.set()

    async def end(self) -> None:
        """After its last call."""
        while self._calls:
            self._idle.clear()
            await self._idle.wait()
        await self._running.aclose()
        self.worker.close()


Load = Callable[[Path | None], Awaitable[Loaded]]
"""From a model's folder; None: the one that the settings name."""


class InService:
    """The one scorer that calls are given to."""

    def __init__(self, first: Loaded, on_failure: Callable[[BaseException], None]) -> None:
        self._loaded = first
        self._on_failure = on_failure

    @property
    def about(self) -> About:
        return self._loaded.scorer.about

    async def begin(self) -> None:
        await self._loaded.begin(self._on_failure)

    async def end(self) -> None:
        await self._loaded.end()

    async def score(self, call: Call) -> tuple[list[Score], About]:
        """The scores, and of whom."""
        loaded = self._loaded
        return await loaded.score(call), loaded.scorer.about

    async def exchange(self, new: Loaded) -> None:
        """Returns when nobody uses the old one any more."""
        await new.begin(self._on_failure)
        old, self._loaded = self._loaded, new
        _log.info("reward model %s is in service, after %s", new.scorer.about.model_sha256[:8], _named(old))
        await old.end()


async def first_loaded(path: Path | None, load: Load) -> Loaded:
    """What a service starts with: what the file names, if there is one."""
    pointer = None if path is None else read_pointer(path)
    return await load(None if pointer is None else Path(pointer.folder))


async def follow(path: Path, in_service: InService, load: Load, poll_s: float) -> None:
    """Until cancelled. A model that cannot be loaded is named, and the one in service stays."""
    refused: Pointer | None = None
    while True:
        await asyncio.sleep(poll_s)
        pointer = read_pointer(path)
        if pointer is None or pointer == refused or pointer.sha256 == in_service.about.model_sha256:
            continue
        try:
            await in_service.exchange(await _checked(pointer, load))
        except RlhfError as error:
            refused = pointer
            _log.warning("reward model %s stays in service: %s", in_service.about.model_sha256[:8], error)


async def _checked(pointer: Pointer, load: Load) -> Loaded:
    loaded = await load(Path(pointer.folder))
    found = loaded.scorer.about.model_sha256
    if found != pointer.sha256:
        loaded.worker.close()
        raise ModelError(f"{pointer.folder}: holds {found[:8]}, not the reward model {pointer.sha256[:8]} expected")
    return loaded


def _named(loaded: Loaded) -> str:
    return loaded.scorer.about.model_sha256[:8]
