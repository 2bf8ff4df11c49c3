"""One round: from the newest policy's completions to a reward model in service and an audit.

    sample ─▶ select ─▶ judge ─▶ refresh ─▶ compare ─▶ put into service ─▶ audit ─▶ round.json

Every stage leaves a file in `rounds/<n>/` that appears complete or not at all, and is not done again where there is
one: killed at any moment, a round goes on after the last one, and nothing is judged twice. The audit's pairs are put to
the judges together with the rankings, so that they sit down once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.annotate.tasks import Task
from rlhf.data.prompts import Prompt
from rlhf.data.rows import Row, read_rows, write_rows
from rlhf.data.samples import Sampled, read_samples, write_samples
from rlhf.errors import StageFailed
from rlhf.feedback.judgments import CompletionShown, Judgment, read_judgments, write_judgments
from rlhf.feedback.withdrawn import without_withdrawn
from rlhf.models.ensemble import reward_sha256
from rlhf.models.folders import read_json, write_json
from rlhf.queues.registry import Registry
from rlhf.reward.exchange import Pointer, write_pointer
from rlhf.rollouts.services import Scores
from rlhf.rounds.judges import Judges
from rlhf.rounds.measures import audited, compare_models, worth_of_active
from rlhf.rounds.plan import Planned
from rlhf.rounds.refresh import features_of, first_judgments, first_model, refresh, scores_of
from rlhf.rounds.sampling import Asked, Sampler
from rlhf.rounds.selection import Chosen, bald, choose, is_given_up
from rlhf.settings.run import Settings

log = logging.getLogger(__name__)

HOLDER = "rounds"
"""Of a pause while a round is judged."""
AUDITOR = "audit"
"""Of a pause because of an audit, which a person lifts."""


@dataclass(frozen=True)
class Tools:
    """What all rounds of a run share."""

    settings: Settings
    sampler: Sampler
    judges: Judges
    registry: Registry
    in_service: Callable[[], str]
    """Asks the reward service for the sha256 of its model."""
    doing: Callable[[str], None]
    """Told what the round does, for `rlhf status`."""


@dataclass(frozen=True)
class Question:
    """A task, and what the round does with its answers."""

    task: Task
    heldout: bool
    """Measured with, not trained on."""


class Round:
    def __init__(self, tools: Tools, planned: Planned) -> None:
        self._tools, self._settings, self._planned = tools, tools.settings, planned
        self._folder = self._settings.paths.rounds / str(planned.number)

    @property
    def done(self) -> bool:
        return (self._folder / "round.json").exists()

    def run(self) -> None:
        """
        Raises:
            RlhfError: a service, the judges or training failed; what was done stays done.
        """
        planned, registry = self._planned, self._tools.registry
        began = time.monotonic()
        if self._holds:
            registry.pause(HOLDER, f"round {planned.number} of feedback is judged first")
        else:
            registry.resume(HOLDER)
        figures: dict[str, Any] = {"round": planned.number, "planned_step": planned.step, **self._sample()}
        if planned.number > 0:
            questions = self._questions()
            judgments = self._judged(questions)
            figures |= self._counts(questions, judgments)
            if planned.refreshes:
                figures |= self._refresh(questions, judgments)
                registry.resume(HOLDER)
            figures["audit"] = self._audit(judgments)
        figures["seconds"] = round(time.monotonic() - began, 2)
        write_json(self._folder / "round.json", figures)
        log.info("round %d is done: %s", planned.number, _in_words(figures))

    # --- sample

    def _sample(self) -> dict[str, Any]:
        """Both kinds of completions, of weights at least as new as those that PPO has now."""
        current = self._tools.registry.current()
        at_least = None if current is None else current.version
        for asked, path in (
            (self._candidates, self._path("samples")),
            (self._audited, self._path("audit-samples")),
        ):
            if not path.exists() and asked.prompts:
                self._tools.doing(f"round {self._planned.number}: sampling {len(asked.prompts)} prompts")
                write_samples(path, self._tools.sampler.sample(asked, at_least))
        policies = {str(one.version): one.version.step for path in self._sampled for one in read_samples(path)}
        return {"policy_step": max(policies.values(), default=0), "policies": sorted(policies)}

    @property
    def _sampled(self) -> list[Path]:
        return [path for path in (self._path("samples"), self._path("audit-samples")) if path.exists()]

    @property
    def _candidates(self) -> Asked:
        return self._asked("candidates", self._planned.candidates, self._settings.feedback.completions)

    @property
    def _audited(self) -> Asked:
        """One completion each of the same prompts in every round."""
        return self._asked("audit", self._planned.audit, 1)

    def _asked(self, what: str, prompts: Sequence[Prompt], completions: int) -> Asked:
        number = self._planned.number
        name = f"{self._settings.run.name}/rounds/{number}/{what}"
        # Other seeds in every round; those of a round's completions follow each other.
        seed = self._settings.feedback.seed + (number + 1) * 1_000_003
        return Asked(name, prompts, completions, seed)

    # --- select

    def _questions(self) -> list[Question]:
        path = self._path("questions")
        if not path.exists():
            self._tools.doing(f"round {self._planned.number}: choosing what to ask")
            found = [*self._rankings(), *self._pairs()]
            unique = {question.task.task_id: question for question in found}
            write_rows(path, [{"task": asdict(one.task), "heldout": one.heldout} for one in unique.values()])
        return [_question(row) for row in read_rows(path)]

    def _rankings(self) -> list[Question]:
        if not self._planned.refreshes:
            return []
        its, samples = self._settings.feedback, read_samples(self._path("samples"))
        scores = self._tools.sampler.score(self._candidates, samples)
        worth = bald([one.member_scores for one in scores], self._log_odds())
        active = self._is_active(scores)
        # Where all completions are the same there is nothing to rank.
        usable = [number for number, one in enumerate(samples) if len({each.text for each in one.completions}) > 1]
        chosen = choose(
            worth[usable] if active else None,
            len(usable),
            its.prompts,
            its.random_share,
            its.seed + self._planned.number,
        )
        write_json(
            self._path("selection", ".json"),
            {
                "chosen_by": "bald" if active else "random",
                "candidates": len(samples),
                "bald_of_candidates": float(worth.mean()),
                "bald_of_chosen": _mean([worth[usable[one.index]] for one in chosen if not one.heldout]),
                "scored_by": sorted({one.model_sha256 for one in scores}),
            },
        )
        return [self._ranking(samples[usable[one.index]], one, scores[0].model_sha256) for one in chosen]

    def _ranking(self, sampled: Sampled, chosen: Chosen, reward_model: str) -> Question:
        task = Task(
            sampled.prompt,
            self._shown(sampled),
            need=self._settings.annotate.need if self._settings.feedback.people else 1,
            source=chosen.source,
            p_select=min(1.0, max(chosen.p_select, 1e-9)),
            priority=1.0,
            reward_model=reward_model,
            metadata=sampled.metadata,
        )
        return Question(task, chosen.heldout)

    def _pairs(self) -> list[Question]:
        """The new policy's completion first in the record, the earlier one's second; the page shows them shuffled."""
        pairs = self._audit_pairs()
        tasks = [
            Task(
                new.prompt,
                self._shown(new) + self._shown(old),
                kind="pair",
                source="audit",
                priority=1.0,
                metadata=new.metadata,
            )
            for new, old in pairs
            if self._text(new) != self._text(old)
        ]
        return [Question(task, True) for task in tasks]

    def _audit_pairs(self) -> list[tuple[Sampled, Sampled]]:
        if not self._path("audit-samples").exists():
            return []
        before = self._settings.paths.rounds / str(self._planned.number - 1) / "audit-samples.jsonl"
        return list(zip(read_samples(self._path("audit-samples")), read_samples(before), strict=True))

    def _shown(self, sampled: Sampled) -> tuple[CompletionShown, ...]:
        shaping, drawn = self._settings.shaping, asdict(sampled.sampling)
        del drawn["completions"]
        return tuple(
            CompletionShown(
                shaping.scored(each.text),
                id=f"{self._planned.number}/{sampled.prompt_index}/{place}",
                policy_version=str(sampled.version),
                sampling=drawn | {"seed": each.seed},
            )
            for place, each in enumerate(sampled.completions)
        )

    def _text(self, sampled: Sampled) -> str:
        return self._settings.shaping.scored(sampled.completions[0].text)

    def _log_odds(self) -> float:
        """Of one unit of the normalised score."""
        model = read_json(self._model_in_service() / "reward_model.json")
        return float(model["std"])

    def _is_active(self, scores: Sequence[Scores]) -> bool:
        earlier = self._earlier()
        if not self._settings.feedback.active or scores[0].member_scores.shape[1] == 1:
            return False
        if any(figures["chosen_by"] == "random" for figures in earlier):
            return False
        gains = [float(figures["active_gain"]) for figures in earlier[-2:] if "active_gain" in figures]
        if is_given_up(gains):
            log.warning("asking what the members disagree about was no better than asking at random; it is given up")
            return False
        return True

    def _earlier(self) -> list[Mapping[str, Any]]:
        folders = [self._settings.paths.rounds / str(number) for number in range(1, self._planned.number)]
        return [read_json(folder / "round.json") for folder in folders]

    # --- judge

    def _judged(self, questions: Sequence[Question]) -> list[Judgment]:
        path = self._path("judgments")
        if not path.exists():
            tasks, asked_unix_s = [one.task for one in questions], self._path("questions").stat().st_mtime
            found = self._tools.judges.judge(tasks, asked_unix_s, self._on_progress) if tasks else []
            write_judgments(path, found)
        return without_withdrawn(self._settings, read_judgments(path)) if path.stat().st_size else []

    def _on_progress(self, answers: int, needed: int) -> None:
        number, tenth = self._planned.number, max(1, needed // 10)
        self._tools.doing(f"round {number}: {answers} of {needed} answers")
        if self._holds and answers % tenth == 0:
            self._tools.registry.pause(HOLDER, f"round {number} of feedback: {answers} of {needed} answers")

    def _counts(self, questions: Sequence[Question], judgments: Sequence[Judgment]) -> dict[str, Any]:
        return {
            "questions": len(questions),
            "judgments": len(judgments),
            "annotators": len({one.annotator for one in judgments}),
            "heldout": sum(one.heldout and one.task.source != "audit" for one in questions),
        }

    # --- refresh, compare, put into service

    def _refresh(self, questions: Sequence[Question], judgments: Sequence[Judgment]) -> dict[str, Any]:
        heldout_ids = {one.task.task_id for one in questions if one.heldout}
        rankings = [one for one in judgments if one.source != "audit"]
        heldout = [one for one in rankings if one.task_id in heldout_ids]
        others = [one for one in rankings if one.task_id not in heldout_ids]
        path = self._path("refresh", ".json")
        if not path.exists():
            training = without_withdrawn(self._settings, [*self._before(), *others])
            self._tools.doing(f"round {self._planned.number}: training the reward model on {len(training)} judgments")
            trained = refresh(self._settings, training, self._folder)
            figures = self._compared(heldout, others) | {
                "training_judgments": len(training),
                "reward_model_accuracy": trained["reward_model_accuracy"],
                "model_sha256": reward_sha256(self._folder / "reward-model"),
            }
            write_json(path, figures)
        figures = read_json(path)
        if figures["promoted"]:
            self._put_into_service(figures["model_sha256"])
        return {**read_json(self._path("selection", ".json")), **figures}

    def _compared(self, heldout: Sequence[Judgment], others: Sequence[Judgment]) -> dict[str, Any]:
        settings, before = self._settings, self._model_in_service()
        if not heldout:
            return compare_models([], [], [], 0.0)
        in_service, new = (scores_of(settings, folder, heldout) for folder in (before, self._folder / "reward-model"))
        figures = compare_models(heldout, in_service, new, settings.feedback.promote_margin)
        figures["score_shift"] = float(np.mean(np.concatenate(new) - np.concatenate(in_service)))
        active = [one for one in others if one.source == "active"]
        gain = worth_of_active(active, heldout, *features_of(settings, before, [*heldout, *active])) if active else None
        return figures | ({} if gain is None else gain.as_json("active_gain"))

    def _before(self) -> list[Judgment]:
        """The first model's, and earlier rounds' rankings, those that were held out then among them."""
        paths = [self._settings.paths.rounds / str(n) / "judgments.jsonl" for n in range(1, self._planned.number)]
        found = [one for path in paths if path.stat().st_size for one in read_judgments(path) if one.source != "audit"]
        return [*first_judgments(self._settings), *found]

    def _model_in_service(self) -> Path:
        """Before this round."""
        promoted = [one["round"] for one in self._earlier() if one.get("promoted")]
        rounds = self._settings.paths.rounds
        return rounds / str(promoted[-1]) / "reward-model" if promoted else first_model(self._settings)

    def _put_into_service(self, sha256: str) -> None:
        """
        Raises:
            StageFailed: the reward service does not take it.
        """
        self._tools.doing(f"round {self._planned.number}: putting reward model {sha256[:8]} into service")
        folder = (self._folder / "reward-model").absolute()
        write_pointer(self._settings.paths.reward_in_service, Pointer(str(folder), sha256, self._planned.number))
        deadline = time.monotonic() + self._settings.run.start_timeout_s
        while self._tools.in_service() != sha256:
            if time.monotonic() > deadline:
                raise StageFailed(
                    f"the reward service does not serve {folder}, which {self._settings.paths.reward_in_service} "
                    f"names; see {self._settings.paths.logs / 'reward.log'}"
                )
            time.sleep(0.2)
        log.info("reward model %s of round %d is in service", sha256[:8], self._planned.number)

    # --- audit

    def _audit(self, judgments: Sequence[Judgment]) -> dict[str, Any]:
        path, pairs = self._path("audit", ".json"), self._audit_pairs()
        if path.exists() or not pairs:
            return dict(read_json(path)) if path.exists() else {"pairs": 0, "over_optimised": False}
        asked = self._audited
        new, old = (self._tools.sampler.score(asked, samples) for samples in zip(*pairs, strict=True))
        rewards = [float(a.scores[0] - b.scores[0]) for a, b in zip(new, old, strict=True)]
        same = sum(self._text(a) == self._text(b) for a, b in pairs)
        figures = audited([one for one in judgments if one.source == "audit"], same, rewards)
        figures |= {"policy": str(pairs[0][0].version), "against": str(pairs[0][1].version)}
        if figures["over_optimised"]:
            self._over_optimised(figures)
        write_json(path, figures)
        return figures

    def _over_optimised(self, figures: Mapping[str, Any]) -> None:
        low, high = figures["win_rate_interval"]
        reason = (
            f"audit of round {self._planned.number}: the reward rose by {figures['reward_gain']:.2f}, but the judges "
            f"prefer the new policy in {figures['win_rate']:.0%} of the pairs only [{low:.0%}, {high:.0%}]"
        )
        if self._planned.refreshes:
            name = self._settings.run.name
            self._tools.registry.pause(AUDITOR, f"{reason}; `rlhf rounds resume --run {name}` lets PPO go on")
        log.warning(reason)

    @property
    def _holds(self) -> bool:
        its = self._settings.feedback
        return self._planned.refreshes and (its.people if its.hold is None else its.hold)

    def _path(self, name: str, suffix: str = ".jsonl") -> Path:
        return self._folder / f"{name}{suffix}"


def _question(row: Row) -> Question:
    fields = dict(row.require("task", dict, "an object"))
    completions = tuple(CompletionShown(**each) for each in fields.pop("completions"))
    return Question(Task(completions=completions, **fields), bool(row.fields["heldout"]))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _in_words(figures: Mapping[str, Any]) -> str:
    words = [f"policy of step {figures['policy_step']}"]
    if "promoted" in figures and "accuracy_new" in figures:
        low, high = figures["accuracy_gain_interval"]
        words.append(
            f"accuracy {figures['accuracy_in_service']:.3f} in service, {figures['accuracy_new']:.3f} refreshed "
            f"(paired {low:+.3f} to {high:+.3f}), {'promoted' if figures['promoted'] else 'not promoted'}"
        )
    if figures.get("audit", {}).get("pairs"):
        audit = figures["audit"]
        low, high = audit["win_rate_interval"]
        words.append(f"new policy preferred in {audit['win_rate']:.0%} of {audit['pairs']} pairs, {low:.0%} at least")
    return "; ".join(words)
