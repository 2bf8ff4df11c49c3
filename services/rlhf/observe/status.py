"""`rlhf status`: what a run is doing, and what waits for what.

Everything shown is what processes said of themselves within their lease, or what Redis holds; nothing is guessed from
logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from rlhf.cli.records import StageRecord
from rlhf.models.folders import read_json
from rlhf.observe.diagnoses import metrics_rows, summary
from rlhf.observe.waits import waits
from rlhf.queues.connection import EMBEDDED, connect
from rlhf.queues.deliveries import QueueDepth
from rlhf.queues.registry import Beat, Current, Replica, open_registry
from rlhf.queues.streams import prompts_queue, rollouts_queue
from rlhf.settings.paths import RunPaths
from rlhf.settings.run import Settings
from rlhf.supervisor.lock import embedded_redis_runs, holder, is_held
from rlhf.supervisor.settings import Stage

PATIENCE_S = 3.0
"""How long a status waits for Redis, whatever the run itself bears."""


@dataclass(frozen=True)
class Traffic:
    """What Redis knows of the run, at one moment."""

    beats: Sequence[Beat]
    replicas: Sequence[Replica]
    current: Current | None
    prompts: QueueDepth
    rollouts: QueueDepth

    @property
    def silent(self) -> bool:
        """No process has said anything within its lease."""
        return not self.beats and not self.replicas


def run(settings: Settings) -> None:
    """Prints the status; blocks for `PATIENCE_S` at most.

    Raises:
        Unavailable: a Redis of one's own (redis.url) does not answer.
    """
    console, paths = _console(), settings.paths
    processes = supervised(paths)
    console.print(headline(settings, processes), highlight=False, markup=False, soft_wrap=True)
    if processes:
        console.print(_process_table(processes))
    traffic = look(settings)
    if traffic is None or traffic.silent:
        if not any(process["name"] == "ppo" for process in processes):
            console.print("step 3 does not run: no trainer, worker or policy reports", highlight=False)
        _print_all(console, diagnoses(paths))
        return
    for table in (_queue_table(traffic), _replica_table(traffic)):
        console.print(table)
    _print_all(console, [*training(traffic, paths), *waits(traffic.beats, traffic.prompts, traffic.replicas)])
    _print_all(console, diagnoses(paths))


def supervised(paths: RunPaths) -> list[dict[str, Any]]:
    """What the supervisor keeps alive; empty when none runs."""
    if not is_held(paths.lock) or not paths.processes.exists():
        return []
    found: list[dict[str, Any]] = read_json(paths.processes)
    return found


def look(settings: Settings) -> Traffic | None:
    """None: the run's embedded Redis is not running."""
    if settings.redis.url == EMBEDDED and not embedded_redis_runs(settings.paths):
        return None
    patience_s = min(PATIENCE_S, settings.redis.connect_timeout_s)
    redis_settings = settings.redis.model_copy(update={"connect_timeout_s": patience_s})
    client = connect(settings.model_copy(update={"redis": redis_settings}))
    name = settings.run.name
    registry = open_registry(client, name, redis_settings)
    return Traffic(
        beats=registry.beats(),
        replicas=registry.replicas(),
        current=registry.current(),
        prompts=prompts_queue(client, name, redis_settings).depth(),
        rollouts=rollouts_queue(client, name, redis_settings).depth(),
    )


def headline(settings: Settings, processes: Sequence[Mapping[str, Any]]) -> str:
    """`run demo: ppo under process 4711; done: world, pretrain`, or that nothing runs."""
    paths, run = settings.paths, settings.run
    done = [stage for stage in get_args(Stage) if StageRecord.read(paths.stages, stage) is not None]
    finished = f"; done: {', '.join(done)}" if done else ""
    if not paths.folder.exists():
        return f"run {run.name}: there is no {paths.folder}"
    if not is_held(paths.lock):
        return f"run {run.name}: no supervisor runs{finished}"
    stage = processes[-1]["name"] if processes else "between two stages"
    return f"run {run.name}: {stage}, under process {holder(paths.lock)}{finished}"


def training(traffic: Traffic, paths: RunPaths) -> list[str]:
    """`step 12 of 40 in epoch 0; staleness 0.0 steps; current weights demo/0-12/ab12cd34`"""
    trainer = next((beat.fields for beat in traffic.beats if beat.service == "ppo"), None)
    if trainer is None:
        return []
    parts = [f"step {trainer['step']} of {trainer['steps']} in epoch {trainer['epoch']}"]
    staleness = _newest_metrics(paths).get("staleness_mean")
    if staleness is not None:
        parts.append(f"staleness {staleness:.1f} steps")
    parts.append(f"{trainer['stale']} stale, {trainer['dead']} dead")
    if traffic.current is not None:
        parts.append(f"current weights {traffic.current.version}")
    return ["; ".join(parts)]


def diagnoses(paths: RunPaths) -> list[str]:
    """What the trainer's monitor has found, in whatever step; nothing where it found nothing."""
    return [str(found) for found in summary(metrics_rows(paths.metrics))]


def _newest_metrics(paths: RunPaths) -> dict[str, Any]:
    rows = metrics_rows(paths.metrics)
    return rows[-1] if rows else {}


def _print_all(console: Console, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _process_table(processes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("process", "state", "pid", "restarts", "address")
    for process in processes:
        table.add_row(*(str(process[name]) for name in ("name", "state", "pid", "restarts", "address")))
    return table


def _queue_table(traffic: Traffic) -> Table:
    table = _table("queue", "entries", "in hand", "oldest", "KiB", "dead letters")
    for name, depth in (("prompts", traffic.prompts), ("rollouts", traffic.rollouts)):
        oldest = f"{depth.oldest_age_s:.1f} s" if depth.entries else ""
        kib = f"{depth.bytes / 1024:.0f}"
        table.add_row(name, str(depth.entries), str(depth.pending), oldest, kib, str(depth.counts.dead))
    return table


def _replica_table(traffic: Traffic) -> Table:
    table = _table("policy", "address", "weights", "prepared", "state")
    for replica in traffic.replicas:
        state = "ready" if replica.ready else "not ready"
        prepared = "" if replica.prepared is None else str(replica.prepared)
        table.add_row(replica.name, replica.address, str(replica.version), prepared, state)
    return table


def _console() -> Console:
    """Wide where nobody looks at a terminal, so that a line stays a line."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
