"""The `rlhf` command: arguments to settings, a verb's module run with them, errors as one sentence.

    rlhf VERB [--config FILE]… [--set section.field=value]… [--run NAME] [--FIELD VALUE]…

torch and transformers are imported by the verbs' modules, after the arguments are understood.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.cli.arguments import Arguments, parse
from rlhf.cli.records import note_end, note_start
from rlhf.cli.verbs import Verb, named_by
from rlhf.errors import RlhfError
from rlhf.observe.logs import configure_logging
from rlhf.settings.loader import load_settings
from rlhf.settings.run import Settings

DEMO = Path(__file__).parent.parent / "supervisor" / "demo.toml"
BY_HAND = DEMO.with_name("demo_by_hand.toml")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, the error's own (see `rlhf.errors`), or 130 after Ctrl-C."""
    started_s = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    log: Path | None = None
    verb = named_by(argv)
    name = f" {verb}" if verb else ""
    try:
        arguments = parse(argv)
        configure_logging(arguments.verb.name)
        settings = _settings(arguments)
        if arguments.verb.kind == "stage" or arguments.verb.name == "rounds":
            log = settings.paths.logs / f"{arguments.verb.name}.log"
        configure_logging(_service(arguments.verb, settings), file=log)
        _run(arguments, settings, started_s)
    except RlhfError as error:
        _tell(f"rlhf{name}: {error}", log)
        return error.exit_code
    except KeyboardInterrupt:
        _tell(f"rlhf{name}: interrupted", log)
        return INTERRUPTED
    except Exception:
        _tell(traceback.format_exc().rstrip(), log)
        return 1
    return 0


def _settings(arguments: Arguments) -> Settings:
    if arguments.verb.name == "demo":
        return _loaded(arguments, [DEMO, BY_HAND] if arguments.annotate else [DEMO])
    settings = _loaded(arguments, [])
    looks = arguments.verb.kind in ("look", "tool") or arguments.verb.name in ("evaluate", "report")
    if looks and settings.paths.settings.exists():
        # Who looks at a run need not say again how it was started.
        return _loaded(arguments, [settings.paths.settings])
    return settings


def _loaded(arguments: Arguments, first: Sequence[Path]) -> Settings:
    return load_settings(
        files=[*first, *arguments.files],
        environment=os.environ,
        overrides=arguments.overrides,
        flags=arguments.flags,
    )


def _run(arguments: Arguments, settings: Settings, started_s: float) -> None:
    """`started_s`: on the monotonic clock; what a stage takes includes its imports."""
    run = getattr(_imported(arguments.verb.module), arguments.verb.function)
    if arguments.verb.kind == "run":
        run(settings, fresh=arguments.fresh)
    elif arguments.verb.kind == "stage":
        _run_stage(arguments.verb, settings, run, started_s)
    elif arguments.verb.asks_redis:
        with importlib.import_module("rlhf.supervisor.group").redis_at_hand(settings):
            run(settings)
    elif arguments.verb.name == "replay":
        run(settings, arguments.overrides)
    else:
        run(settings)


def _imported(module: str) -> Any:
    """The module. Looking for garbage while torch and transformers are imported finds none and takes a second."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.enable()


def _run_stage(verb: Verb, settings: Settings, run: Any, started_s: float) -> None:
    note_start(verb, settings)
    figures: Mapping[str, Any] = run(settings) or {}
    record = note_end(verb, settings, figures, time.monotonic() - started_s)
    logging.getLogger(__name__).info("done in %.1f s%s", record.seconds, _in_words(figures))


def _in_words(figures: Mapping[str, Any]) -> str:
    """The single numbers among a stage's figures; all of them are in its record."""
    numbers = [f"{name} {value:.4g}" for name, value in figures.items() if type(value) in (int, float)]
    return f": {', '.join(numbers)}" if numbers else ""


def _service(verb: Verb, settings: Settings) -> str:
    """The name in the log lines; replicas go by their own."""
    return {"policy": settings.policy.name, "rollouts": settings.rollouts.consumer}.get(verb.name, verb.name)


def _tell(message: str, log: Path | None) -> None:
    """On stderr and, where the stage has one, in its log; as far as they can be written, since the exit code has to
    say what happened also when the disk is full."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    if log is not None and log.exists():
        with suppress(OSError), log.open("a", encoding="utf-8") as file:
            print(message, file=file)


if __name__ == "__main__":
    code = main()
    # The interpreter would look once more through everything that torch has made, for a second or two.
    gc.freeze()
    sys.exit(code)
