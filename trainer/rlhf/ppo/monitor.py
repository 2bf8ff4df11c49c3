"""Watches every step of the trainer, and warns or stops as `MonitorSettings` say.

    step: before the weights change      look      what the batch shows              (`watched.py`)
    publish                              published what replicas hold, and a probe   (`publish.py`, `probe.py`)
    once per step                        judge     the invariants                    (`invariants.py`)
                                         act       log what is new; stop

What is found goes into the step's row of metrics.jsonl, and from there to `rlhf status` and the report.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.errors import StageFailed
from rlhf.models.tokenizer import end_token_ids
from rlhf.ppo.agreement import Agreement, logprob_bound
from rlhf.ppo.experience import Experience
from rlhf.ppo.invariants import Diagnosis, Figures, History, Published, Rules, Step, Watched, diagnose
from rlhf.ppo.learner import Assessment, Learner
from rlhf.ppo.watched import probed, watch
from rlhf.settings.run import Settings
from rlhf.wire.records import Rollout, WeightVersion

log = logging.getLogger(__name__)


class Monitor:
    """
    Args:
        rows: of metrics.jsonl, of the steps that the run goes on from.
    """

    def __init__(
        self,
        settings: Settings,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        rows: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.learner = learner
        self.tokenizer = tokenizer
        self.rules = rules_of(settings, learner)
        self._end_token_ids = end_token_ids(learner.policy, tokenizer)
        self._watched, self._figures = Watched(), dict[str, float]()
        """Of the newest batch."""
        self._present: WeightVersion | None = None
        self._publishes: list[Published] = []
        self._probed: list[Agreement] = []
        """Both since the newest step."""
        window = self.rules.settings.window
        self._start: list[Figures] = []
        self._recent: deque[Figures] = deque(maxlen=window)
        self._names: set[str] = set()
        """Of what was found in the newest step."""
        for row in rows:
            self._remember(row, {found["name"] for found in row.get("diagnoses", ())})

    def look(self, rollouts: Sequence[Rollout], experience: Experience, before: Assessment) -> None:
        """To be called with what the present weights say of a batch, before they change."""
        self._watched, self._figures = watch(
            rollouts, experience, before, self._present, self.learner, self.tokenizer, self._end_token_ids
        )

    def published(
        self,
        version: WeightVersion,
        held: Mapping[str, WeightVersion],
        probe: Callable[[], Mapping[str, Rollout]],
    ) -> None:
        """To be called when the present weights have been published.

        Args:
            held: by replica's name, what each says it holds now.
            probe: answers of the replicas to `rlhf.ppo.probe`, by name; called if it is time for one.
        """
        self._present = version
        self._publishes.append(Published(version, held))
        every = self.rules.settings.probe_every
        if every and version.step % every == 0:
            self._probed += [probed(name, rollout, self.learner) for name, rollout in probe().items()]

    def judge(self, number: int, figures: Mapping[str, float]) -> tuple[dict[str, float], list[Diagnosis]]:
        """To be called once per step, when it is published: the figures with those that only the monitor has, and every
        invariant that is violated."""
        figures = {**figures, **self._figures}
        policies = [*self._watched.policies, *self._probed]
        watched = replace(self._watched, policies=policies, publishes=self._publishes)
        self._publishes, self._probed = [], []
        history = History(self._start, list(self._recent))
        return figures, diagnose(Step(number, figures, watched, history, self.rules))

    def act(self, figures: Figures, diagnoses: Sequence[Diagnosis]) -> None:
        """
        Raises:
            StageFailed: one of them is to stop the run.
        """
        names = {found.name for found in diagnoses}
        for found in diagnoses:
            if found.name not in self._names:
                log.warning("%s", found)
        for name in sorted(self._names - names):
            log.info("%s: holds again", name)
        self._remember(figures, names)
        stops = [found for found in diagnoses if found.severity == "stop"]
        if stops:
            raise StageFailed(
                f"{stops[0]}. The steps since the newest checkpoint are undone; to go on from it as it is, set "
                f"monitor.{stops[0].name} to warn"
            )

    def _remember(self, figures: Mapping[str, Any], names: set[str]) -> None:
        kept = {name: figures.get(name) for name in REMEMBERED}
        if len(self._start) < self.rules.settings.window:
            self._start.append(kept)
        self._recent.append(kept)
        self._names = names


REMEMBERED = (
    *("score_mean", "score_std", "explained_variance", "clip_fraction", "policy_grad_norm", "critic_grad_norm"),
    *("response_tokens_mean", "ended_fraction", "distinct_bigrams"),
)
"""What the history of the invariants consists of."""


def rules_of(settings: Settings, learner: Learner) -> Rules:
    dtypes = (settings.ppo.dtype, settings.policy.dtype, settings.reference.dtype)
    return Rules(
        settings=settings.monitor,
        logprob_bound=logprob_bound(dtypes, settings.monitor.logprob_bound),
        vocab_size=len(learner.output_layer.weight),
        recomputes=settings.ppo.old_logprobs == "recompute",
        policy_learns_from=settings.critic.warmup_steps + 1,
        drops_out=settings.lora.rank > 0 and settings.lora.dropout > 0,
    )
