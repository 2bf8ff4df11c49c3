"""Who judges: simulated annotators at once, or people through the annotation page, who take their time.

Either way a question is a `Task`, whose id is made from what is asked, and a judgment is the native form; asking the
same again, after a restart, finds the answers that there are.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from rlhf.annotate.store import Store
from rlhf.annotate.tasks import Task
from rlhf.data.samples import read_samples
from rlhf.errors import DataError
from rlhf.feedback.judgments import Judgment
from rlhf.preference.annotators import Annotator, Shown, Utilities, pair_differences, ranks_of
from rlhf.preference.rank import annotators_of, utilities_of
from rlhf.preference.settings import RankSettings
from rlhf.preference.utility import Utility, load_utility
from rlhf.reward.rules import ScoreItem
from rlhf.settings.run import Settings

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
OnProgress = Callable[[int, int], None]
"""Answers, and answers needed."""


class Judges(Protocol):
    def judge(self, tasks: Sequence[Task], asked_unix_s: float, on_progress: OnProgress) -> list[Judgment]:
        """Blocks until everything is judged, or nobody has to wait any more.

        Args:
            asked_unix_s: when the tasks were made; deadlines count from there.
        """


class SimulatedJudges:
    """The annotators of the section `rank`, as sure of themselves as they were of the run's first samples: their noise
    does not shrink as the policy's completions grow alike."""

    def __init__(self, rank: RankSettings, utility: Utility, minority: Utility | None, annotators: list[Annotator]):
        self._rank, self._utility, self._minority, self._annotators = rank, utility, minority, annotators

    @classmethod
    def of(cls, settings: Settings) -> SimulatedJudges:
        """
        Raises:
            DataError, RuleError: the run has no samples, or the utility cannot be loaded or tells none of them apart.
        """
        rank, paths = settings.rank, settings.paths
        source = rank.samples or paths.samples
        samples = read_samples(source)
        utility = load_utility(rank.utility or paths.annotators_labelled, rank.seed)
        differences = pair_differences(utilities_of(utility, samples))
        if not len(differences):
            raise DataError("rank.utility gives all completions of each prompt the same utility", path=source)
        minority = load_utility(rank.minority_utility, rank.seed) if rank.minority_utility else None
        return cls(rank, utility, minority, annotators_of(rank, differences))

    def judge(self, tasks: Sequence[Task], asked_unix_s: float, on_progress: OnProgress) -> list[Judgment]:
        found = [judgment for task in tasks for judgment in self._judge(task)]
        on_progress(len(found), len(found))
        return found

    def _judge(self, task: Task) -> list[Judgment]:
        """By annotators, and with noise, that the task alone decides."""
        seed = int.from_bytes(hashlib.sha256(task.task_id.encode()).digest()[:8], "little")
        rng = np.random.default_rng((self._rank.seed, seed))
        count = min(max(task.need, self._rank.judgments_per_prompt), len(self._annotators))
        drawn = sorted(rng.choice(len(self._annotators), size=count, replace=False).tolist())
        utilities = self._of(self._utility, task)
        minority = None if self._minority is None else self._of(self._minority, task)
        return [self._by(self._annotators[number], task, utilities, minority, rng) for number in drawn]

    def _by(
        self,
        annotator: Annotator,
        task: Task,
        utilities: Utilities,
        minority: Utilities | None,
        rng: np.random.Generator,
    ) -> Judgment:
        texts = [each.text for each in task.completions]
        order = tuple(rng.permutation(len(texts)).tolist())
        seen = annotator.sees(Shown(utilities, texts, order, minority), rng)
        return Judgment(
            judgment_id=f"{task.task_id}.{annotator.name}.0",
            task_id=task.task_id,
            prompt=task.prompt,
            metadata=task.metadata,
            completions=task.completions,
            ranks=ranks_of(seen, self._rank.tie_margin),
            order_shown=order,
            annotator=annotator.name,
            source=task.source,  # type: ignore[arg-type]
            p_select=task.p_select,
        )

    def _of(self, utility: Utility, task: Task) -> Utilities:
        """[K]. Annotators read text, so there are no tokens to it."""
        return utility([ScoreItem(task.prompt, each.text, (), task.metadata) for each in task.completions])


class People:
    """Whoever answers on the annotation page.

    A task that somebody skipped waits for others. Once everybody who is at work has skipped or answered it, it is
    waited for no more, or a task that nobody likes could hold up the round until the deadline.
    """

    def __init__(self, store: Store, deadline_s: float) -> None:
        self._store, self._deadline_s = store, deadline_s

    def judge(self, tasks: Sequence[Task], asked_unix_s: float, on_progress: OnProgress) -> list[Judgment]:
        ids = self._store.add_tasks(tasks)
        deadline = asked_unix_s + self._deadline_s
        while (counts := self._store.counts(ids)).remaining:
            on_progress(counts.answers, counts.answers_needed)
            if counts.skipped and self._store.passed(ids) >= counts.remaining:
                said = "the round goes on with %d of %d answers: everybody at work has skipped or answered what is left"
                log.warning(said, counts.answers, counts.answers_needed)
                break
            if time.time() > deadline:
                log.warning("the deadline is over with %d of %d answers", counts.answers, counts.answers_needed)
                break
            time.sleep(LOOK_EVERY_S)
        self._store.close_tasks(ids)
        return self._store.judgments(ids)
