"""Trainers as processes of their own, which can be killed. They are forked from one process that has imported what a
trainer needs and done nothing else, since that takes longer than their steps."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from rlhf.settings.run import Settings

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rlhf.ppo.loop", __name__])


def start_trainer(settings: Settings) -> ForkServerProcess:
    """It ends with the exit code of `rlhf ppo`, or by the signal that it is sent."""
    settings.paths.folder.mkdir(parents=True, exist_ok=True)
    config = settings.paths.folder / "run.json"
    config.write_text(settings.model_dump_json())
    trainer = _CONTEXT.Process(target=_train, args=(config,))
    trainer.start()
    return trainer


def _train(config: Path) -> None:
    from rlhf.ppo import loop

    loop.run(Settings.model_validate_json(config.read_text()))
