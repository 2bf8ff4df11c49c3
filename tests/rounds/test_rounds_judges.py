"""Simulated annotators answer a task alike whenever it is asked; people are waited for."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlhf.annotate.answers import Answer, Form, skip, submit
from rlhf.annotate.assigning import Rules, claim
from rlhf.annotate.store import Store
from rlhf.annotate.tasks import Task
from rlhf.feedback.judgments import CompletionShown
from rlhf.preference.annotators import Annotator
from rlhf.preference.settings import RankSettings
from rlhf.rounds import judges as judges_module
from rlhf.rounds.judges import People, SimulatedJudges
from support.annotating import add_person, sqlite


def task(number, source="random", count=3):
    texts = [f" number {number} {'good ' * place}" for place in range(count)]
    return Task(f"prompt {number}", tuple(map(CompletionShown, texts)), source=source, p_select=0.5)


def how_good(items):
    return np.array([float(item.completion.count("good")) for item in items])


def simulated(noise_scale=0.0, judgments_per_prompt=1):
    annotators = [Annotator(f"simulated-{number}", noise_scale) for number in range(3)]
    rank = RankSettings(reliabilities=(0.9, 0.9, 0.9), judgments_per_prompt=judgments_per_prompt)
    return SimulatedJudges(rank, how_good, None, annotators)


def ask(judges, tasks, asked_unix_s=None):
    progress = []
    found = judges.judge(tasks, asked_unix_s or time.time(), lambda *counts: progress.append(counts))
    return found, progress


def test_simulated_annotators_rank_what_they_are_asked():
    found, progress = ask(simulated(), [task(1), task(2, "audit", 2)])
    assert [one.ranks for one in found] == [(3, 2, 1), (2, 1)]
    assert [one.source for one in found] == ["random", "audit"]
    assert {one.p_select for one in found} == {0.5}
    assert [one.task_id for one in found] == [task(1).task_id, task(2, "audit", 2).task_id]
    assert progress == [(2, 2)]


def test_a_task_is_judged_alike_however_often_and_beside_whatever_it_is_asked():
    judges, tasks = simulated(noise_scale=2.0), [task(number) for number in range(12)]
    once, _ = ask(judges, tasks)
    again, _ = ask(judges, tasks[::-1])
    assert sorted(once, key=str) == sorted(again, key=str)
    assert len({one.annotator for one in once}) == 3
    assert len({one.ranks for one in once}) > 1


def test_several_annotators_rank_one_prompt():
    found, _ = ask(simulated(judgments_per_prompt=2), [task(1)])
    assert len({one.annotator for one in found}) == len(found) == 2
    assert len({one.judgment_id for one in found}) == 2


class FakeStore:
    """Answers as many tasks as it is told to, one each time it is asked for counts."""

    def __init__(self, answers, passed=0):
        self.left, self.beyond = answers, passed
        self.answers, self.tasks, self.closed = 0, [], []

    def add_tasks(self, tasks):
        self.tasks = list(tasks)
        return [one.task_id for one in tasks]

    def counts(self, ids):
        assert list(ids) == [one.task_id for one in self.tasks]
        if self.left:
            self.left, self.answers = self.left - 1, self.answers + 1
        remaining = len(self.tasks) - self.answers
        return type("Counts", (), {"remaining": remaining, "skipped": self.beyond, "answers": self.answers,
                                   "answers_needed": len(self.tasks)})  # fmt: skip

    def passed(self, ids):
        return self.beyond

    def close_tasks(self, ids):
        self.closed = list(ids)

    def judgments(self, ids):
        return [f"judgment of {name}" for name in ids[: self.answers]]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges_module, "LOOK_EVERY_S", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(sqlite(tmp_path))
    yield store
    store.close()


def test_people_are_waited_for():
    store, tasks = FakeStore(answers=4), [task(number) for number in range(4)]
    found, progress = ask(People(store, 60), tasks)
    assert len(found) == 4
    assert progress == [(1, 4), (2, 4), (3, 4)]
    assert store.closed == [one.task_id for one in tasks]


def test_what_nobody_is_left_for_is_not_waited_for(caplog):
    found, _ = ask(People(FakeStore(answers=3, passed=1), 60), [task(number) for number in range(4)])
    assert len(found) == 3
    assert "3 of 4 answers: everybody at work has skipped" in caplog.text


def test_a_skipped_task_is_waited_for_until_somebody_else_has_answered_it(store: Store):
    rules, tasks = Rules(repeat_share=0, gold_share=0), [task(1), task(2)]
    ada, bob = (add_person(store, name) for name in ("ada", "bob"))
    store.add_tasks(tasks)
    held = claim(store.database, bob, rules, time.time())
    assert held.task.id == tasks[0].task_id

    def act(who, skips):
        mine, now = claim(store.database, who, rules, time.time()), time.time()
        form = Form(mine.id, mine.fence, f"key-{mine.id}-{mine.fence}")
        if skips:
            skip(store.database, who, form, flags=["unclear"], reason="", now=now)
        else:
            submit(store.database, who, form, Answer((1, 2, 3)), revision=0, now=now, per_minute=9)

    # One before each look. Once there is one answer and one skip for two tasks, nobody does anything for a while.
    deeds = iter([(ada, True), (bob, False), None, (bob, False)])
    found = People(store, 60).judge(tasks, time.time(), lambda *_: (deed := next(deeds)) and act(*deed))
    assert [one.task_id for one in found] == [one.task_id for one in tasks]


def test_the_deadline_counts_from_when_the_tasks_were_made(caplog):
    store = FakeStore(answers=2)
    found, _ = ask(People(store, 60), [task(number) for number in range(4)], asked_unix_s=time.time() - 61)
    assert len(found) == 1
    assert store.closed
    assert "1 of 4 answers" in caplog.text


def test_the_page_s_store_takes_a_round_s_tasks_and_lets_nobody_wait_after_the_last_answer(store: Store):
    """The real store: tasks wait until somebody has answered; a round that asks again finds the answer."""
    people, tasks = People(store, 0.3), [task(1)]
    found, progress = ask(people, tasks)
    assert found == []
    assert progress[0] == (0, 1)
    assert store.counts([tasks[0].task_id]).answers_needed == 0  # closed at the deadline
    again = threading.Thread(target=ask, args=(people, tasks))
    again.start()
    again.join(5)
    assert not again.is_alive()
