"""The ledger: what became of every prompt that was issued. Pure bookkeeping, saved in every checkpoint.

    issue ─▶ outstanding ─┬─▶ trained      its rollout is in the weights
                          ├─▶ stale        its rollout came from weights too old, or from a future that a restart undid
                          └─▶ dead         three failures at a worker
                              │
                              └─ stale and dead prompts are issued again at attempt + 1; after `max_failures` deaths the
                                 prompt is abandoned and the next one takes its place: a step never waits for what
                                 cannot come

A rollout id is `<run>/<prompt index>/<attempt>`, so the same prompt issued twice at one attempt is one rollout.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rlhf.wire.records import Rollout, WeightVersion


class Verdict(Enum):
    """What the trainer does with a rollout that arrived."""

    TRAIN = "train"
    STALE = "stale"
    """From weights that are too old, or that are no ancestor of the present ones."""
    KNOWN = "known"
    """Its id has an outcome already, or was issued again since: nothing to do but acknowledge."""
    DEAD = "dead"
    """Of a dead letter: counted, and its prompt goes out again or was abandoned."""
    EARLY = "early"
    """Its prompt has not been issued yet. Only after a restart: the future that was undone had issued it, and this one
    will, under the same id, which the stream then recognises as sent already. So keep the rollout until it does."""


@dataclass(frozen=True)
class Issue:
    """A prompt to be sent to the workers."""

    prompt_index: int
    attempt: int


class Lineage:
    """The weights that the present ones descend from: for each epoch, the last step that was kept.

    A trainer that restarts from the checkpoint of step 10 begins a new epoch at step 10; steps 11 and later of the
    epoch before led nowhere.
    """

    def __init__(self, run_id: str, kept: Mapping[int, int], epoch: int) -> None:
        self.run_id = run_id
        self.kept = dict(kept)
        self.epoch = epoch

    def restarted(self, step: int, epoch: int) -> Lineage:
        """The lineage of a new epoch that goes on from `step`."""
        if epoch <= self.epoch:
            raise ValueError(f"epoch: must be above {self.epoch}, {epoch} received")
        return Lineage(self.run_id, {**self.kept, self.epoch: step}, epoch)

    def contains(self, version: WeightVersion) -> bool:
        if version.run_id != self.run_id:
            return False
        return version.epoch == self.epoch or version.step <= self.kept.get(version.epoch, -1)


class Ledger:
    """Admission and outcomes. Used by the trainer's main thread and by the prompt source's thread.

    Args:
        batch: prompts per step.
        max_steps: steps of the whole run; nothing is issued that no step would train on.
        max_staleness: steps by which a rollout's weights may be behind.
        max_failures: deaths after which a prompt is abandoned.
    """

    def __init__(self, lineage: Lineage, *, batch: int, max_steps: int, max_staleness: int, max_failures: int) -> None:
        self.lineage = lineage
        self.batch = batch
        self.max_steps = max_steps
        self.max_staleness = max_staleness
        self.max_failures = max_failures
        self.trained_steps = 0
        self.published_steps = -1
        self.cursor = 0
        self.outstanding: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.trained: dict[str, int] = {}
        self.stale: set[str] = set()
        self.dead: dict[str, str] = {}
        self.known: set[str] = set()
        """Ids that came without being asked for and have no other outcome: of another run, or issued again since."""
        self.abandoned: dict[int, str] = {}
        self.changed = threading.Condition()
        self._to_send: deque[Issue] = deque()

    def rollout_id(self, issue: Issue) -> str:
        return f"{self.lineage.run_id}/{issue.prompt_index}/{issue.attempt}"

    @property
    def room(self) -> int:
        """Prompts that may be issued now: (max_staleness + published steps + 1) · batch - (trained + outstanding).

        Source: the admission control of AReaL (Fu et al. 2025, arXiv:2505.24298).
        """
        allowed_steps = min(self.max_staleness + self.published_steps + 1, self.max_steps)
        return allowed_steps * self.batch - self.trained_prompts - len(self.outstanding)

    @property
    def trained_prompts(self) -> int:
        return len(self.trained)

    def next_issue(self) -> Issue | None:
        """The next prompt to send, now counted as outstanding; None: nothing to send until something changes."""
        with self.changed:
            if self._to_send:
                return self._to_send.popleft()
            if self.room <= 0:
                return None
            issue = Issue(self.cursor, 0)
            self.cursor += 1
            self.outstanding[issue.prompt_index] = issue.attempt
            return issue

    def judge(self, rollout: Rollout) -> Verdict:
        if rollout.run_id != self.lineage.run_id:
            return Verdict.KNOWN
        if self._is_early(rollout.prompt_index, rollout.attempt):
            return Verdict.EARLY
        if self.outstanding.get(rollout.prompt_index) != rollout.attempt:
            return Verdict.KNOWN
        versions = rollout.versions
        fresh = all(self.lineage.contains(version) for version in versions)
        if not versions or not fresh or self.staleness(rollout) > self.max_staleness:
            return Verdict.STALE
        return Verdict.TRAIN

    def staleness(self, rollout: Rollout) -> int:
        """Steps by which the oldest weights behind the rollout are behind the present ones."""
        return self.trained_steps - min(version.step for version in rollout.versions)

    def train(self, rollouts: Sequence[Rollout]) -> None:
        """One step was made from these rollouts."""
        with self.changed:
            for rollout in rollouts:
                del self.outstanding[rollout.prompt_index]
                self.failures.pop(rollout.prompt_index, None)
                self.trained[rollout.rollout_id] = self.trained_steps
            self.trained_steps += 1

    def publish(self, steps: int) -> None:
        """The weights behind `steps` steps are out: prompts may ask for them."""
        with self.changed:
            self.published_steps = steps
            self.changed.notify_all()

    def mark_stale(self, rollout: Rollout) -> None:
        """Issue the prompt of a stale rollout again."""
        with self.changed:
            self.stale.add(rollout.rollout_id)
            self._issue_again(rollout.prompt_index, rollout.attempt)

    def mark_unused(self, rollout: Rollout) -> None:
        """Count a rollout that came too late for any step, or was early for one that never came."""
        with self.changed:
            self.stale.add(rollout.rollout_id)

    def mark_known(self, rollout: Rollout) -> None:
        """Count a rollout that nobody waits for, unless its id has an outcome already."""
        with self.changed:
            if rollout.rollout_id not in self.trained and rollout.rollout_id not in self.stale | self.dead.keys():
                self.known.add(rollout.rollout_id)

    def mark_dead(self, rollout_id: str, reason: str) -> Verdict:
        """Issue the prompt of a dead letter again, or abandon it.

        Returns:
            DEAD where that was done, KNOWN where it had been, EARLY where it is to be told again later.
        """
        run_id, prompt_index, attempt = _parse(rollout_id)
        with self.changed:
            if run_id != self.lineage.run_id:
                return Verdict.KNOWN  # of an earlier run of this name, or an entry that somebody else wrote
            if self._is_early(prompt_index, attempt):
                return Verdict.EARLY
            if self.outstanding.get(prompt_index) != attempt:
                return Verdict.KNOWN
            self.dead[rollout_id] = reason
            self.failures[prompt_index] = self.failures.get(prompt_index, 0) + 1
            if self.failures[prompt_index] < self.max_failures:
                self._issue_again(prompt_index, attempt)
            else:
                del self.outstanding[prompt_index]
                del self.failures[prompt_index]
                self.abandoned[prompt_index] = reason
                self.changed.notify_all()
            return Verdict.DEAD

    def send_again(self) -> int:
        """Send everything outstanding once more, at the same attempt; returns how many.

        After a restart nobody knows what arrived. What did arrive is recognised by its id.
        """
        with self.changed:
            self._to_send = deque(Issue(index, attempt) for index, attempt in sorted(self.outstanding.items()))
            self.changed.notify_all()
            return len(self._to_send)

    def _is_early(self, prompt_index: int, attempt: int) -> bool:
        return prompt_index >= self.cursor or attempt > self.outstanding.get(prompt_index, attempt)

    def _issue_again(self, prompt_index: int, attempt: int) -> None:
        self.outstanding[prompt_index] = attempt + 1
        self._to_send.append(Issue(prompt_index, attempt + 1))
        self.changed.notify_all()

    def to_json(self) -> dict[str, Any]:
        with self.changed:
            return {
                "run_id": self.lineage.run_id,
                "epoch": self.lineage.epoch,
                "kept": sorted(self.lineage.kept.items()),
                "trained_steps": self.trained_steps,
                "cursor": self.cursor,
                "outstanding": sorted(self.outstanding.items()),
                "failures": sorted(self.failures.items()),
                "trained": dict(self.trained),
                "stale": sorted(self.stale),
                "dead": dict(self.dead),
                "known": sorted(self.known),
                "abandoned": sorted(self.abandoned.items()),
            }

    def restore(self, state: Mapping[str, Any], epoch: int) -> None:
        """Take up the ledger of a checkpoint in a new epoch."""
        saved = Lineage(state["run_id"], _pairs(state["kept"]), state["epoch"])
        self.lineage = saved.restarted(state["trained_steps"], epoch)
        self.trained_steps = state["trained_steps"]
        self.cursor = state["cursor"]
        self.outstanding = _pairs(state["outstanding"])
        self.failures = _pairs(state["failures"])
        self.trained = dict(state["trained"])
        self.stale = set(state["stale"])
        self.dead = dict(state["dead"])
        self.known = set(state["known"])
        self.abandoned = dict(state["abandoned"])
        self.send_again()


def _pairs(rows: Iterable[Sequence[int]]) -> dict[int, int]:
    """JSON has no integer keys, so mappings from integers are saved as pairs."""
    return {int(key): int(value) for key, value in rows}


def _parse(rollout_id: str) -> tuple[str, int, int]:
    """Run, prompt index, attempt; ("", -1, -1) of an id that is none of ours."""
    parts = rollout_id.rsplit("/", 2)
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return "", -1, -1
    return parts[0], int(parts[1]), int(parts[2])
