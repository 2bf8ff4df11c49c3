"""What is asked: a prompt with the completions to compare, and why they were chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, get_args

from rlhf.errors import RequestError
from rlhf.feedback.judgments import SOURCES, CompletionShown

Kind = Literal["rank", "pair", "best-worst"]
KINDS: tuple[str, ...] = get_args(Kind)
MAX_COMPLETIONS = 9
"""There is one digit for each rank."""
EVERYBODY = 1_000_000
"""`need` of a task that everybody is to answer once."""


@dataclass(frozen=True)
class Task:
    """One unit of work for `need` people."""

    prompt: str
    completions: tuple[CompletionShown, ...]
    """[K], K from 2 to 9; 2 for a pair."""
    kind: Kind = "rank"
    need: int = 1
    """How many people answer it."""
    source: str = "random"
    """As in `rlhf.feedback.judgments.Judgment`."""
    p_select: float | None = None
    """Probability with which it was selected."""
    priority: float = 0.0
    """Higher ones first, equal ones in the order in which they were added."""
    gold_ranks: tuple[int, ...] | None = None
    """[K], with source "gold": the ranking that is right."""
    reward_model: str = ""
    """By whose uncertainty it was selected."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The prompt's; travels to the judgment."""
    task_id: str = ""
    """Adding an id again changes nothing. Left empty, it is made from what is asked."""

    def __post_init__(self) -> None:
        """
        Raises:
            RequestError: it cannot be asked; says why.
        """
        if problem := self._problem():
            raise RequestError(f"this is no task that people can be asked: {problem}")
        if not self.task_id:
            object.__setattr__(self, "task_id", _id_of(self))

    def _problem(self) -> str:
        count = len(self.completions)
        gold = self.gold_ranks
        rules = {
            f"2 to {MAX_COMPLETIONS} completions can be ranked, not {count}": not 2 <= count <= MAX_COMPLETIONS,
            f"a pair has two completions, not {count}": self.kind == "pair" and count != 2,
            f"the best and the worst are of three or more, not {count}": self.kind == "best-worst" and count < 3,
            f"kind must be one of {', '.join(KINDS)}, not {self.kind}": self.kind not in KINDS,
            f"source must be one of {', '.join(SOURCES)}, not {self.source}": self.source not in SOURCES,
            f"need must be 1 or more, not {self.need}": self.need < 1,
            "gold_ranks and source gold belong together": (gold is not None) != (self.source == "gold"),
            f"gold_ranks must be {count} ranks from 1 on": gold is not None and not _are_ranks(gold, count),
        }
        return next((sentence for sentence, broken in rules.items() if broken), "")


def gold(task: Task, ranks: tuple[int, ...]) -> Task:
    """The same question to everybody, with the answer that is right."""
    return replace(task, source="gold", gold_ranks=ranks, need=EVERYBODY, p_select=None, task_id=f"{task.task_id}:gold")


def dense(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """[K] The same order with ranks 1, 2, … and none left out: (2, 5, 2) is (1, 2, 1)."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    return tuple(places[rank] for rank in ranks)


def _are_ranks(ranks: tuple[int, ...], count: int) -> bool:
    return len(ranks) == count and ranks == dense(ranks)


def _id_of(task: Task) -> str:
    asked = asdict(task)
    for name in ("need", "priority", "task_id"):
        del asked[name]
    canonical = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
