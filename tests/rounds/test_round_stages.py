"""One round with stand-ins for the services: in order, killed after any stage, with whatever verdict."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.annotate.accounts import set_state
from rlhf.annotate.store import open_store
from rlhf.data.prompts import Prompt
from rlhf.data.samples import Sampled, SampledCompletion
from rlhf.errors import StageFailed
from rlhf.feedback.judgments import Judgment, read_judgments
from rlhf.feedback.snapshots import read_snapshot
from rlhf.models.folders import read_json, write_json
from rlhf.queues.registry import Current
from rlhf.reward.exchange import read_pointer
from rlhf.rollouts.services import Scores
from rlhf.rounds import round as round_module
from rlhf.rounds.measures import Mean
from rlhf.rounds.plan import Planned, plan
from rlhf.rounds.round import AUDITOR, HOLDER, Round, Tools
from rlhf.settings.run import Settings
from rlhf.wire.records import FinishReason, Sampling, WeightVersion
from support.annotating import add_person

PROMPTS = [Prompt(f"prompt {number}", None, {"row": str(number)}) for number in range(60)]


class FakeSampler:
    """Completions of which the first word says how good they are, by a policy that has made `step` steps."""

    def __init__(self, members: int = 2) -> None:
        self.step, self.calls, self.members = 0, [], members

    def sample(self, asked: Any, at_least: Any) -> list[Sampled]:
        self.calls.append(asked.name)
        version = WeightVersion("tiny", 0, self.step, f"{self.step:064d}")
        rng = np.random.default_rng(asked.seed)
        return [
            Sampled(
                number,
                prompt.text,
                prompt.metadata,
                tuple(
                    SampledCompletion(f" {rng.integers(100)} of step {self.step}", (1, 2), (-1.0, -1.0),
                                      FinishReason.EOS, asked.seed + place)
                    for place in range(asked.completions)
                ),
                Sampling(completions=asked.completions),
                version,
            )
            for number, prompt in enumerate(asked.prompts)
        ]  # fmt: skip

    def score(self, asked: Any, samples: list[Sampled]) -> list[Scores]:
        self.calls.append(f"score {asked.name}")
        rng = np.random.default_rng(0)
        return [
            Scores(
                np.full(len(one.completions), float(one.version.step), np.float32),
                rng.normal(size=(len(one.completions), self.members)).astype(np.float32),
                "in service",
            )
            for one in samples
        ]


class FakeRegistry:
    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.ever: list[str] = []

    def current(self) -> Current:
        return Current(WeightVersion("tiny", 0, 0, "0" * 64), "")

    def pause(self, holder: str, reason: str) -> None:
        self.held[holder] = reason
        self.ever.append(holder)

    def resume(self, holder: str) -> bool:
        return self.held.pop(holder, None) is not None


class FakeJudges:
    """Like the higher first word; in an audit `prefers` the new policy (0) or the old one (1)."""

    def __init__(self, prefers: int = 0) -> None:
        self.prefers, self.asked, self.name = prefers, [], "x"

    def judge(self, tasks: Any, asked_unix_s: float, on_progress: Any) -> list[Judgment]:
        assert abs(time.time() - asked_unix_s) < 60
        self.asked += [task.task_id for task in tasks]
        on_progress(len(tasks), len(tasks))
        return [self._judgment(task) for task in tasks]

    def _judgment(self, task: Any) -> Judgment:
        values = [-int(each.text.split()[0]) for each in task.completions]
        ranks = tuple(int(rank) for rank in np.argsort(np.argsort(values)) + 1)
        if task.source == "audit":
            ranks = (1, 2) if self.prefers == 0 else (2, 1)
        return Judgment(
            judgment_id=f"{task.task_id}.x",
            task_id=task.task_id,
            prompt=task.prompt,
            completions=task.completions,
            ranks=ranks,
            annotator=self.name,
            source=task.source,
            p_select=task.p_select,
        )


class World:
    """A run folder with everything that rounds ask, and what they did."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **feedback: Any) -> None:
        feedback = {"rounds": 3, "prompts": 10, "candidates": 1.6, "completions": 3, "audit_pairs": 8, **feedback}
        self.settings = Settings.model_validate(
            {"run": {"folder": str(folder), "name": "tiny", "start_timeout_s": 0.5}, "feedback": feedback}
        )
        self.paths = self.settings.paths
        self.sampler, self.registry, self.judges = FakeSampler(), FakeRegistry(), FakeJudges()
        self.trained: list[int] = []
        self.better, self.gain, self.serves = True, 0.1, True
        write_json(self.paths.reward_model / "reward_model.json", {"mean": 0.0, "std": 1.5})
        (self.paths.reward_model / "reference_set.jsonl").write_text("{}\n")
        monkeypatch.setattr(round_module, "refresh", self._refresh)
        monkeypatch.setattr(round_module, "scores_of", self._scores_of)
        monkeypatch.setattr(round_module, "reward_sha256", lambda folder: f"sha256 of {folder.parent.name}")
        monkeypatch.setattr(round_module, "features_of", lambda *_: ({}, np.zeros(1)))
        monkeypatch.setattr(round_module, "worth_of_active", lambda *_: Mean(self.gain, (0.0, 1.0), 9))
        self.plan = plan(PROMPTS, self.settings.feedback, 70)

    def run(self, number: int) -> dict[str, Any]:
        planned = self.plan[number]
        self.sampler.step = max(self.sampler.step, planned.step)
        Round(self.tools, planned).run()
        found: dict[str, Any] = read_json(self.paths.rounds / str(number) / "round.json")
        return found

    @property
    def tools(self) -> Tools:
        return Tools(self.settings, self.sampler, self.judges, self.registry, self._in_service, lambda doing: None)  # type: ignore[arg-type]

    def _refresh(self, settings: Settings, judgments: Any, folder: Path) -> dict[str, float]:
        self.trained.append(len(judgments))
        self.training = list(judgments)
        write_json(folder / "reward-model" / "reward_model.json", {"mean": 0.0, "std": 2.0})
        return {"reward_model_accuracy": 0.8}

    def _scores_of(self, settings: Settings, folder: Path, judgments: list[Judgment]) -> list[Any]:
        """The better model orders as the judges do."""
        good = (folder.name == "reward-model" and folder.parent.name.isdecimal()) is self.better
        return [np.array(one.ranks) * (-1.0 if good else 1.0) for one in judgments]

    def _in_service(self) -> str:
        pointer = read_pointer(self.paths.reward_in_service)
        return pointer.sha256 if pointer and self.serves else ""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_round_from_samples_to_the_audit(world: World) -> None:
    world.run(0)
    one = world.run(1)
    assert world.sampler.calls == [
        *("tiny/rounds/0/audit", "tiny/rounds/1/candidates", "tiny/rounds/1/audit"),
        *("score tiny/rounds/1/candidates", "score tiny/rounds/1/audit", "score tiny/rounds/1/audit"),
    ]
    assert (one["policy_step"], one["planned_step"]) == (10, 10)
    assert one["judgments"] == len(set(world.judges.asked)) == 10 + 8
    assert (one["heldout"], one["heldout_prompts"], one["chosen_by"]) == (3, 3, "bald")
    assert one["promoted"]
    assert one["accuracy_gain"] == pytest.approx(1.0)
    assert one["training_judgments"] == 7, "what is held out, and the audit, are not trained on"
    assert read_pointer(world.paths.reward_in_service).sha256 == one["model_sha256"] == "sha256 of 1"
    assert (one["audit"]["win_rate"], one["audit"]["pairs"], one["audit"]["reward_gain"]) == (1.0, 8, 10.0)
    assert not one["audit"]["over_optimised"]
    assert world.registry.ever == []


def test_every_judgment_says_where_it_came_from(world: World) -> None:
    world.run(0)
    world.run(1)
    rows = [json.loads(line) for line in (world.paths.rounds / "1" / "questions.jsonl").read_text().splitlines()]
    tasks = [row["task"] for row in rows]
    rankings = [task for task in tasks if task["source"] != "audit"]
    assert {task["source"] for task in rankings} == {"random", "active"}
    assert all(0 < task["p_select"] <= 1 and task["reward_model"] == "in service" for task in rankings)
    assert all(each["policy_version"].startswith("tiny/0-10/") for task in rankings for each in task["completions"])
    assert all("seed" in each["sampling"] for task in rankings for each in task["completions"])
    pairs = [task for task in tasks if task["source"] == "audit"]
    versions = {tuple(each["policy_version"].split("/")[1] for each in task["completions"]) for task in pairs}
    assert versions == {("0-10", "0-0")}
    assert {task["kind"] for task in pairs} == {"pair"}


STAGES = ["samples.jsonl", "audit-samples.jsonl", "questions.jsonl", "judgments.jsonl", "refresh.json", "audit.json"]


@pytest.mark.parametrize("last", range(len(STAGES)))
def test_killed_after_a_stage_it_goes_on_with_the_next(world: World, last: int) -> None:
    world.run(0)
    whole = world.run(1)
    folder = world.paths.rounds / "1"
    kept = {name: (folder / name).read_bytes() for name in STAGES[: last + 1]}
    for name in [*STAGES[last + 1 :], "round.json"]:
        (folder / name).unlink()
    world.sampler.calls.clear()
    world.judges.asked.clear()
    world.trained.clear()
    again = world.run(1)
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert not [call for call in world.sampler.calls if call == "tiny/rounds/1/candidates"]
    assert bool(world.judges.asked) is (last < STAGES.index("judgments.jsonl"))
    assert bool(world.trained) is (last < STAGES.index("refresh.json"))
    for figures in (whole, again):
        del figures["seconds"]
    assert again == whole


def test_the_next_round_trains_on_all_that_was_judged_before(world: World) -> None:
    for number in (0, 1):
        world.run(number)
    two = world.run(2)
    assert two["training_judgments"] == 10 + 7
    assert {one.source for one in world.training} == {"random", "active"}
    before = {one.task_id for one in read_judgments(world.paths.rounds / "1" / "judgments.jsonl")}
    assert len(before & {one.task_id for one in world.training}) == 10
    assert two["audit"]["against"].startswith("tiny/0-10/")


def test_who_withdrew_is_trained_on_no_more(world: World) -> None:
    for number in (0, 1):
        world.run(number)
    with closing(open_store(world.settings)) as store:
        add_person(store, "lea", "lead")
        withdrawn = add_person(store, "x", pseudonym="x")
        world.judges.name = "y"
        before = world.run(2)["training_judgments"]
        set_state(store.database, withdrawn, "withdrawn")
    assert before == 10 + 7
    for name in ("refresh.json", "round.json"):
        (world.paths.rounds / "2" / name).unlink()
    assert world.run(2)["training_judgments"] == 7
    # Also of the round itself, where it goes on after a kill.
    for name in ("refresh.json", "round.json"):
        (world.paths.rounds / "1" / name).unlink()
    assert world.run(1)["judgments"] == 0


def test_a_worse_model_stays_out_of_service(world: World) -> None:
    world.run(0)
    world.better = False
    one = world.run(1)
    assert not one["promoted"]
    assert one["accuracy_gain"] == pytest.approx(-1.0)
    assert not world.paths.reward_in_service.exists()
    world.better = True
    assert world.run(2)["promoted"]
    assert read_pointer(world.paths.reward_in_service).round == 2


def test_a_reward_service_that_does_not_follow_ends_the_round(world: World) -> None:
    world.run(0)
    world.serves = False
    with pytest.raises(StageFailed, match=r"does not serve .*rounds/1/reward-model"):
        world.run(1)
    world.serves = True
    assert world.run(1)["promoted"]


def test_reward_up_and_audit_down_pauses_ppo(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.run(0)
    world.judges.prefers = 1
    one = world.run(1)
    assert one["audit"]["over_optimised"]
    assert one["audit"]["win_rate"] == 0
    assert "rlhf rounds resume --run tiny" in world.registry.held[AUDITOR]
    assert "0%" in world.registry.held[AUDITOR]


def test_the_closing_audit_pauses_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 1, 2, 3):
        world.run(number)
    world.judges.prefers = 1
    last = world.run(4)
    assert last["audit"]["over_optimised"]
    assert "promoted" not in last
    assert world.registry.held == {}
    assert "the reward rose" in caplog.text


def test_ppo_is_held_while_a_round_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch, hold=True)
    world.run(0)
    assert world.registry.ever == []
    held: list[dict[str, str]] = []
    refresh = world._refresh
    monkeypatch.setattr(round_module, "refresh", lambda *args: held.append(dict(world.registry.held)) or refresh(*args))
    world.run(1)
    assert "round 1 of feedback: 18 of 18 answers" in held[0][HOLDER]
    assert world.registry.held == {}


def test_active_choice_that_was_no_better_twice_is_given_up(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.run(0)
    world.gain = -0.01
    assert [world.run(number)["chosen_by"] for number in (1, 2)] == ["bald", "bald"]
    world.gain = 0.5
    assert world.run(3)["chosen_by"] == "random"
    assert "no better than asking at random" in caplog.text


def test_a_single_member_has_nothing_to_choose_by(world: World) -> None:
    world.sampler = FakeSampler(members=1)
    world.run(0)
    one = world.run(1)
    assert one["chosen_by"] == "random"
    assert (one["heldout"], one["training_judgments"]) == (3, 7)


def test_equal_texts_are_a_tie_that_nobody_is_asked_about(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = world.sampler.sample

    def sample(asked: Any, at_least: Any) -> list[Sampled]:
        found = alike(asked, at_least)
        if asked.completions > 1:
            return found
        return [replace(one, completions=(replace(one.completions[0], text=" 7"),)) for one in found]

    monkeypatch.setattr(world.sampler, "sample", sample)
    world.run(0)
    one = world.run(1)
    assert one["judgments"] == 10
    assert (one["audit"]["win_rate"], one["audit"]["pairs"]) == (0.5, 8)


def test_a_planned_round_without_candidates_refreshes_nothing() -> None:
    assert not Planned(4, 9, [], PROMPTS).refreshes
    assert Planned(1, 9, PROMPTS, []).refreshes


def test_snapshots_of_a_round_can_be_read(world: World, tmp_path: Path) -> None:
    """What training is given is a snapshot by hash."""
    from rlhf.rounds import refresh as refresh_module

    world.run(0)
    world.run(1)
    taken: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh_module.train, "run", lambda settings: taken.append(settings.reward_model) or {})
        refresh_module.refresh(world.settings, world.training, tmp_path / "again")
    section = taken[0]
    assert len(read_snapshot(section.comparisons).judgments) == 7
    assert section.reference_set == world.paths.reward_model
    assert section.out == tmp_path / "again" / "reward-model"
    assert section.threads == 1
