"""`rlhf audit`: was every rollout trained once, dead-lettered, or counted stale?

Three witnesses that were written independently must agree: the ledger in the newest checkpoint, the log of what each
step trained on, and the counters that the queue's scripts keep in Redis.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from rlhf.errors import DataError, ModelError, StageFailed
from rlhf.ppo.checkpoint import checkpoints, read_ledger
from rlhf.queues.connection import connect
from rlhf.queues.streams import QueueDepth, prompts_queue, rollouts_queue
from rlhf.settings.run import Settings


@dataclass(frozen=True)
class Finding:
    """One statement, and whether it holds."""

    statement: str
    holds: bool


def run(settings: Settings) -> dict[str, Any]:
    """Print each statement and whether it holds.

    Raises:
        ModelError: the run has no checkpoint.
        StageFailed: a statement does not hold.
    """
    ledger = newest_ledger(settings.paths.checkpoints)
    client = connect(settings)
    findings = [
        *ledger_findings(ledger),
        *log_findings(ledger, read_log(settings.paths.trained), settings.ppo.batch_prompts),
        *queue_findings(ledger, client, settings),
    ]
    for finding in findings:
        print(f"{'ok     ' if finding.holds else 'BROKEN '} {finding.statement}")
    broken = [finding.statement for finding in findings if not finding.holds]
    if broken:
        raise StageFailed(f"the audit found {len(broken)} broken statement(s), the first: {broken[0]}")
    counts = {name: len(ledger[name]) for name in ("trained", "stale", "dead", "abandoned", "outstanding")}
    print("clean: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return counts


def newest_ledger(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ModelError: there is no checkpoint.
    """
    saved = checkpoints(folder)
    if not saved:
        raise ModelError(f"{folder} holds no checkpoint, so there is nothing to audit; has `rlhf ppo` run?")
    return read_ledger(saved[-1])


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of trained.jsonl; a last line that a kill cut short does not count, since its step did not either.

    Raises:
        DataError: a line in the middle is damaged.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError("is no JSON", path=path, line=number) from error
    return rows


def ledger_findings(ledger: Mapping[str, Any]) -> list[Finding]:
    """Every attempt that was ever issued has exactly one outcome, and all add up."""
    outcomes = Counter([*ledger["trained"], *ledger["stale"], *ledger["dead"], *ledger["known"]])
    run_id = ledger["run_id"]
    outstanding = {f"{run_id}/{index}/{attempt}" for index, attempt in ledger["outstanding"]}
    abandoned = {index for index, _ in ledger["abandoned"]}
    issued = set(range(ledger["cursor"]))
    settled = {int(rollout_id.rsplit("/", 2)[1]) for rollout_id in ledger["trained"]}
    open_prompts = {index for index, _ in ledger["outstanding"]}
    return [
        Finding(
            f"each of {len(outcomes)} rollout ids has one outcome",
            all(count == 1 for count in outcomes.values()),
        ),
        Finding(f"none of {len(outstanding)} outstanding ids has an outcome", not outstanding & outcomes.keys()),
        Finding(
            f"each of {ledger['cursor']} issued prompts was trained on, is outstanding, or was abandoned",
            settled | open_prompts | abandoned == issued
            and len(settled) + len(open_prompts) + len(abandoned) == len(issued),
        ),
    ]


def log_findings(ledger: Mapping[str, Any], log: Iterable[Mapping[str, Any]], batch: int) -> list[Finding]:
    """The log of the steps that count holds exactly the ledger's trained ids, each once, `batch` to a step."""
    steps = effective_steps(ledger, log)
    ids = Counter(rollout_id for row in steps for rollout_id in row["rollout_ids"])
    twice = [rollout_id for rollout_id, count in ids.items() if count > 1]
    return [
        Finding(
            f"the log has each of {ledger['trained_steps']} steps once",
            [row["step"] for row in steps] == list(range(1, ledger["trained_steps"] + 1)),
        ),
        Finding(f"each step trained on {batch} prompts", all(len(row["rollout_ids"]) == batch for row in steps)),
        Finding(f"no rollout was trained twice{f', but {twice[:3]}' if twice else ''}", not twice),
        Finding("log and ledger name the same rollouts", ids.keys() == ledger["trained"].keys()),
    ]


def effective_steps(ledger: Mapping[str, Any], log: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows whose step is part of the present weights: an epoch counts up to the step that the next one went on from."""
    kept = dict(ledger["kept"]) | {ledger["epoch"]: ledger["trained_steps"]}
    return [row for row in log if row["step"] <= kept.get(row["epoch"], -1)]


def queue_findings(ledger: Mapping[str, Any], client: redis.Redis, settings: Settings) -> list[Finding]:
    """Nothing left a queue without an outcome in the ledger, and nothing is left in it that nobody waits for."""
    prompts = prompts_queue(client, settings.run.name, settings.redis).depth()
    rollouts = rollouts_queue(client, settings.run.name, settings.redis).depth()
    findings = [*_conserved("prompts", prompts), *_conserved("rollouts", rollouts)]
    outcomes = len(ledger["trained"]) + len(ledger["stale"]) + len(ledger["known"])
    letters = prompts.counts.dead + rollouts.counts.dead
    findings += [
        Finding(
            f"the {rollouts.counts.acknowledged} acknowledged rollouts are among the ledger's {outcomes}",
            rollouts.counts.acknowledged <= outcomes,
        ),
        Finding(f"the ledger's {len(ledger['dead'])} dead are among {letters} letters", len(ledger["dead"]) <= letters),
    ]
    if not ledger["outstanding"]:
        left = prompts.entries + rollouts.entries
        findings.append(Finding(f"{left} entries wait, and nothing is outstanding", left == 0))
    return findings


def _conserved(name: str, depth: QueueDepth) -> list[Finding]:
    counts = depth.counts
    total = counts.acknowledged + counts.dead + counts.lost + depth.entries
    return [
        Finding(
            f"{name}: {counts.added} added = {counts.acknowledged} acknowledged + {counts.dead} dead + "
            f"{depth.entries} waiting",
            counts.added == total,
        ),
        Finding(f"{name}: nothing was deleted by somebody else", counts.lost == 0),
    ]
