"""What must hold of leases and answers on every database: SQLite in the suite, PostgreSQL in the system tests."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, select

from rlhf.annotate.accounts import set_state
from rlhf.annotate.answers import Answer, Conflict, Form, Receipt, skip, submit
from rlhf.annotate.assigning import Rules, claim, renew, take_back
from rlhf.annotate.store import Store
from rlhf.annotate.tables import LATE, Assignment, Base
from rlhf.annotate.tasks import gold
from rlhf.errors import Overloaded, RequestError
from support.annotating import NOW, add_person, task

RULES = Rules(lease_s=60, repeat_share=0, gold_share=0)
ANSWER = Answer((1, 2, 2))


def form(assignment: Assignment, key: str = "") -> Form:
    return Form(assignment.id, assignment.fence, key or f"key-{assignment.id}-{assignment.fence}")


class AnnotationSemantics:
    @pytest.fixture
    def store(self, database_url: str) -> Iterator[Store]:
        store = Store(database_url)
        yield store
        store.close()

    def submit(self, store: Store, who: int, form: Form, answer: Answer = ANSWER, **others: object) -> Receipt:
        fields = {"revision": 0, "now": NOW, "per_minute": 1000, **others}
        return submit(store.database, who, form, answer, **fields)  # type: ignore[arg-type]

    def test_the_migrations_make_the_tables_as_they_are_declared(self, store: Store) -> None:
        with store.database.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []

    def test_tasks_are_added_once(self, store: Store) -> None:
        first = store.add_tasks([task(0), task(1)])
        assert store.add_tasks([task(1), task(2)])[0] == first[1]
        assert store.counts().tasks == 3

    def test_an_answer_keeps_its_provenance(self, store: Store) -> None:
        who = add_person(store, "ada")
        [id_] = store.add_tasks([task(metadata={"row": "7"}, source="active", p_select=0.25)])
        mine = claim(store.database, who, RULES, NOW)
        assert mine is not None
        answer = Answer((2, 1, 1), None, ("all-bad",), "both dull", 4200, "v1")
        self.submit(store, who, form(mine), answer)
        [judgment] = store.judgments([id_])
        assert (judgment.task_id, judgment.prompt, judgment.metadata) == (id_, "prompt 0", {"row": "7"})
        assert judgment.ranks == (2, 1, 1)
        assert judgment.order_shown == tuple(mine.order_shown)
        assert judgment.completions == task().completions
        assert judgment.policy_version == "run/1/0"
        assert (judgment.source, judgment.p_select, judgment.ms_visible) == ("active", 0.25, 4200)
        assert (judgment.flags, judgment.reason, judgment.guideline_version) == (("all-bad",), "both dull", "v1")
        assert judgment.annotator == "a-ada!"
        assert judgment.created_at == "2023-11-14T22:13:20+00:00"

    def test_a_task_is_held_by_one(self, store: Store) -> None:
        ada, bob = add_person(store, "ada"), add_person(store, "bob")
        store.add_tasks([task()])
        first = claim(store.database, ada, RULES, NOW)
        assert first is not None
        assert claim(store.database, bob, RULES, NOW + 59) is None
        again = claim(store.database, ada, RULES, NOW + 59)
        assert again is not None
        assert (again.id, again.fence, again.order_shown) == (first.id, first.fence, first.order_shown)
        assert again.lease_until == NOW + 119

    def test_two_slots_go_to_two_people_once_each(self, store: Store) -> None:
        people = [add_person(store, name) for name in ("ada", "bob", "cy")]
        store.add_tasks([task(need=2)])
        given = [claim(store.database, who, RULES, NOW) for who in people]
        assert [None if each is None else each.slot for each in given] == [0, 1, None]
        assert given[0] is not None
        self.submit(store, people[0], form(given[0]))
        assert claim(store.database, people[0], RULES, NOW) is None

    def test_an_expired_lease_goes_to_another_and_the_first_answer_is_late(self, store: Store) -> None:
        ada, bob = add_person(store, "ada"), add_person(store, "bob")
        store.add_tasks([task()])
        first = claim(store.database, ada, RULES, NOW)
        taken = claim(store.database, bob, RULES, NOW + 61)
        assert first is not None
        assert taken is not None
        assert taken.fence > first.fence
        assert self.submit(store, ada, form(first), now=NOW + 62).late
        assert not self.submit(store, bob, form(taken), now=NOW + 63).late
        assert len(store.judgments()) == 1
        assert len(store.judgments(late=True)) == 2
        assert store.counts().late == 1
        assert claim(store.database, ada, RULES, NOW + 70) is None

    def test_an_expired_lease_that_nobody_took_is_still_good(self, store: Store) -> None:
        ada = add_person(store, "ada")
        store.add_tasks([task()])
        first = claim(store.database, ada, RULES, NOW)
        assert first is not None
        assert not self.submit(store, ada, form(first), now=NOW + 5000).late

    def test_who_lost_a_task_may_get_it_again_under_a_new_fence(self, store: Store) -> None:
        ada, bob = add_person(store, "ada"), add_person(store, "bob")
        store.add_tasks([task()])
        first = claim(store.database, ada, RULES, NOW)
        taken = claim(store.database, bob, RULES, NOW + 61)
        assert first is not None
        assert taken is not None
        skip(store.database, bob, form(taken), flags=["unclear"], reason="no idea", now=NOW + 62)
        again = claim(store.database, ada, RULES, NOW + 63)
        assert again is not None
        assert again.id == first.id
        assert again.fence > taken.fence
        assert self.submit(store, ada, form(first, "old form"), now=NOW + 64).late
        with store.database.reading() as session:
            assert session.get_one(Assignment, first.id).state == LATE

    def test_a_submit_again_is_acknowledged_again_and_saved_once(self, store: Store) -> None:
        who = add_person(store, "ada")
        store.add_tasks([task()])
        mine = claim(store.database, who, RULES, NOW)
        assert mine is not None
        first, again = self.submit(store, who, form(mine)), self.submit(store, who, form(mine))
        assert (first.again, again.again) == (False, True)
        assert first.judgment_id == again.judgment_id
        assert store.counts().judgments == 1
        with pytest.raises(Conflict, match="the change after it was not"):
            self.submit(store, who, form(mine), Answer((2, 1, 1)))
        with pytest.raises(Conflict, match="already"):
            self.submit(store, who, form(mine, "another window"))

    def test_a_change_is_a_revision_and_the_old_one_is_kept(self, store: Store) -> None:
        who = add_person(store, "ada")
        store.add_tasks([task()])
        mine = claim(store.database, who, RULES, NOW)
        assert mine is not None
        self.submit(store, who, form(mine))
        self.submit(store, who, form(mine, "changed"), Answer((2, 1, 1)), revision=1)
        assert [(each.revision, each.ranks) for each in store.judgments()] == [(1, (2, 1, 1))]
        assert [each.ranks for each in store.judgments(all_revisions=True)] == [(1, 2, 2), (2, 1, 1)]

    def test_nobody_answers_anothers_task(self, store: Store) -> None:
        ada, bob = add_person(store, "ada"), add_person(store, "bob")
        store.add_tasks([task()])
        mine = claim(store.database, ada, RULES, NOW)
        assert mine is not None
        with pytest.raises(RequestError, match="not given to you"):
            self.submit(store, bob, form(mine))

    def test_skipping_frees_the_task_for_others_only(self, store: Store) -> None:
        ada, bob = add_person(store, "ada"), add_person(store, "bob")
        store.add_tasks([task()])
        mine = claim(store.database, ada, RULES, NOW)
        assert mine is not None
        for _ in range(2):
            skip(store.database, ada, form(mine), flags=[], reason="tired", now=NOW)
        assert store.counts().skipped == 1
        assert claim(store.database, ada, RULES, NOW) is None
        assert take_back(store.database, ada, mine.id, NOW, 60).fence > mine.fence
        assert claim(store.database, bob, RULES, NOW) is None

    def test_a_lease_is_renewed_by_its_holder_only(self, store: Store) -> None:
        ada, bob = add_person(store, "ada"), add_person(store, "bob")
        store.add_tasks([task()])
        mine = claim(store.database, ada, RULES, NOW)
        assert mine is not None
        assert renew(store.database, ada, mine.id, mine.fence, NOW + 200)
        assert not renew(store.database, bob, mine.id, mine.fence, NOW + 900)
        assert claim(store.database, bob, RULES, NOW + 190) is None
        assert claim(store.database, bob, RULES, NOW + 201) is not None
        assert not renew(store.database, ada, mine.id, mine.fence, NOW + 900)

    def test_too_many_answers_in_a_minute_are_refused(self, store: Store) -> None:
        who = add_person(store, "ada")
        store.add_tasks([task(number) for number in range(3)])
        for _ in range(2):
            mine = claim(store.database, who, RULES, NOW)
            assert mine is not None
            self.submit(store, who, form(mine), per_minute=2)
        mine = claim(store.database, who, RULES, NOW)
        assert mine is not None
        with pytest.raises(Overloaded):
            self.submit(store, who, form(mine), per_minute=2)
        self.submit(store, who, form(mine), per_minute=2, now=NOW + 61)

    def test_gold_and_repeats_come_unannounced(self, store: Store) -> None:
        who = add_person(store, "ada")
        store.add_tasks([task(number) for number in range(3)])
        store.add_tasks([gold(task(9), (1, 2, 3))])
        rules = Rules(lease_s=60, repeat_share=0.5, gold_share=0.49, repeat_gap=1)
        for _ in range(30):
            if mine := claim(store.database, who, rules, NOW):
                self.submit(store, who, form(mine))
        seen = Counter(each.source for each in store.judgments())
        assert seen == {"random": 3, "gold": 1, "repeat": 2}
        assert store.gold() == {f"{task(9).task_id}:gold": (1, 2, 3)}
        [settled] = [each for each in store.judgments() if each.source == "gold"]
        assert settled.metadata["gold_ranks"] == "[1, 2, 3]"
        assert store.counts().remaining == 0

    def test_a_skipped_task_is_passed_once_nobody_is_left_for_it(self, store: Store) -> None:
        ids = store.add_tasks([task(0, need=2), task(1, need=2)])
        people = [add_person(store, name) for name in ("ada", "bob", "cy")]
        add_person(store, "lea", "lead")  # who ranks nothing, and so is not waited for

        def skip_or_answer(who: int, skips: bool) -> int:
            mine = claim(store.database, who, RULES, NOW)
            assert mine is not None
            if skips:
                skip(store.database, who, form(mine), flags=["unclear"], reason="", now=NOW)
            else:
                self.submit(store, who, form(mine))
            return store.passed(ids)

        ada, bob, cy = people
        assert [skip_or_answer(ada, True), skip_or_answer(ada, False)] == [2, 2]
        # Bob has it before him, and takes it away from nobody by skipping the other one.
        held = claim(store.database, bob, RULES, NOW)
        assert held is not None
        assert store.passed(ids) == 0
        assert [skip_or_answer(bob, False), skip_or_answer(bob, True)] == [1, 2]
        assert store.counts(ids).remaining == 2
        assert claim(store.database, cy, RULES, NOW) is not None
        assert store.passed(ids) == 0
        assert [skip_or_answer(cy, False), skip_or_answer(cy, True)] == [0, 1]
        assert store.counts(ids).remaining == 1
        set_state(store.database, cy, "withdrawn")
        assert (store.counts(ids).remaining, store.passed(ids)) == (2, 2)

    def test_who_withdraws_leaves_no_judgment_and_others_answer_again(self, store: Store) -> None:
        ada, bob = add_person(store, "ada"), add_person(store, "bob")
        store.add_tasks([task()])
        mine = claim(store.database, ada, RULES, NOW)
        assert mine is not None
        self.submit(store, ada, form(mine))
        set_state(store.database, ada, "withdrawn")
        assert store.judgments() == []
        assert store.counts().remaining == 1
        theirs = claim(store.database, bob, RULES, NOW)
        assert theirs is not None
        assert claim(store.database, ada, RULES, NOW) is None

    def test_who_is_paused_gets_nothing_new(self, store: Store) -> None:
        ada = add_person(store, "ada")
        store.add_tasks([task()])
        set_state(store.database, ada, "paused")
        assert claim(store.database, ada, RULES, NOW) is None
        set_state(store.database, ada, "active")
        assert claim(store.database, ada, RULES, NOW) is not None

    def test_closed_tasks_are_given_to_nobody(self, store: Store) -> None:
        ada = add_person(store, "ada")
        ids = store.add_tasks([task(0), task(1)])
        store.close_tasks(ids[:1])
        mine = claim(store.database, ada, RULES, NOW)
        assert mine is not None
        assert mine.task.id == ids[1]
        assert store.counts().tasks == 1

    def test_many_at_once_hold_each_slot_once(self, store: Store) -> None:
        """Twelve people in threads; leases so short that some run out in the middle."""
        people = [add_person(store, f"p{number}") for number in range(12)]
        ids = store.add_tasks([task(number, need=2) for number in range(20)])
        clock, step = [NOW], threading.Lock()

        def now() -> float:
            with step:
                clock[0] += 0.05
                return clock[0]

        def work(who: int) -> int:
            done = 0
            while mine := claim(store.database, who, Rules(lease_s=1.0, repeat_share=0, gold_share=0), now()):
                receipt = self.submit(store, who, form(mine), now=now())
                done += not receipt.late
            return done

        with ThreadPoolExecutor(12) as pool:
            done = sum(pool.map(work, people))
        judgments = store.judgments()
        assert len(judgments) == done == 40
        assert set(Counter(each.task_id for each in judgments).values()) == {2}
        assert len({(each.task_id, each.annotator) for each in store.judgments(late=True)}) == store.counts().judgments
        assert store.counts(ids).remaining == 0
        with store.database.reading() as session:
            held = session.scalars(select(func.count()).where(Assignment.slot.is_not(None))).one()
        assert held == 40
