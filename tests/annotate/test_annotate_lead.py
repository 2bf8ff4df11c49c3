"""The lead's pages, and the figures on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from rlhf.annotate.answers import Answer, Form, submit
from rlhf.annotate.assigning import Rules, claim
from rlhf.annotate.quality import Reliability, Share, report
from rlhf.annotate.store import Store
from rlhf.annotate.tasks import gold
from rlhf.data.rows import read_rows
from rlhf.feedback.judgments import judgment_from_row
from support.annotating import NOW, PASSWORD, add_person, sqlite, task
from support.annotation_client import Clock, app_of, log_in, site_of, submit_form

RULES = Rules(lease_s=60, repeat_share=0.3, gold_share=0.3, repeat_gap=1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(sqlite(tmp_path))
    yield store
    store.close()


@pytest.fixture
def lead(store: Store) -> Iterator[httpx.Client]:
    add_person(store, "lea", role="lead")
    with TestClient(app_of(site_of(store, Clock(NOW)))) as client:
        log_in(client, "lea")
        yield client


def work(store: Store, who: int, ranks: tuple[int, ...] | None, rules: Rules = RULES) -> None:
    """Answers everything with these ranks; None: whatever is shown first is best."""
    while mine := claim(store.database, who, rules, NOW):
        by_place = [mine.order_shown.index(index) + 1 for index in range(3)]
        answer = Answer(ranks or tuple(by_place), ms_visible=3000)
        form = Form(mine.id, mine.fence, f"{mine.id}-{mine.fence}")
        submit(store.database, who, form, answer, revision=0, now=NOW, per_minute=10**6)


def person(store: Store, name: str) -> Reliability:
    return next(each for each in report(store, NOW).people if each.account.name == name)


def test_wilson_intervals() -> None:
    """Against the values in R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert (round(Share(hits, count).low, 4), round(Share(hits, count).high, 4)) == (low, high)
    assert math.isnan(Share(0, 0).value)


def test_the_careless_and_the_dissenting_are_told_apart(store: Store) -> None:
    store.add_tasks([task(number, need=4) for number in range(40)])
    store.add_tasks([gold(task(100 + number), (1, 2, 3)) for number in range(10)])
    for name, ranks in (("ada", (1, 2, 3)), ("bob", (1, 2, 3)), ("cy", (2, 1, 3)), ("clicker", None)):
        work(store, add_person(store, name), ranks)
    ada, cy, clicker = (person(store, name) for name in ("ada", "cy", "clicker"))
    assert ada.with_gold.value == 1.0
    assert ada.with_self.value == 1.0
    assert ada.with_self.count >= 20
    assert cy.with_self.value == 1.0
    assert cy.with_gold.value == pytest.approx(2 / 3)
    assert cy.with_others.value < ada.with_others.value
    assert clicker.with_self.value < 0.85
    assert clicker.with_gold.high < 0.9
    assert clicker.first.value == 1.0
    assert clicker.prefers_first
    assert not ada.prefers_first
    assert (ada.median_s, ada.first_expected) == (3.0, pytest.approx(1 / 3))


def test_what_the_report_says_of_all(store: Store) -> None:
    store.add_tasks([task(number, need=2) for number in range(3)])
    rules = Rules(repeat_share=0, gold_share=0)
    work(store, add_person(store, "ada"), (1, 2, 3), rules)
    work(store, add_person(store, "bob"), (3, 2, 1), rules)
    found = report(store, NOW)
    assert found.pairwise == 0.0
    assert found.alpha is not None
    assert found.alpha < 0
    assert [each.opposed.value for each in found.disagreements] == [1.0] * 3
    assert found.by_version == [("run/1/0", 6, 6)]
    assert found.by_day[-1] == ("2023-11-14", 6)
    assert sum(each.best.hits for each in found.positions) == 6


def test_the_page_shows_it(store: Store, lead: httpx.Client) -> None:
    assert "No answers yet." in lead.get("/lead").text
    store.add_tasks([task(number, need=2) for number in range(3)])
    for name, ranks in (("ada", (1, 2, 3)), ("<bob>", (3, 2, 1))):
        work(store, add_person(store, name), ranks, Rules(repeat_share=0, gold_share=0))
    text = lead.get("/lead").text
    for expected in ("6 <span", "Krippendorff", "&lt;bob&gt;", "a-ada!", "Where people disagree", "run/1/0"):
        assert expected in text
    assert " style=" not in text


def test_pausing_resuming_and_withdrawing(store: Store, lead: httpx.Client) -> None:
    who = add_person(store, "ada")
    store.add_tasks([task()])
    work(store, who, (1, 2, 3))
    page = lead.get("/lead")
    for action, state in (("pause", "paused"), ("resume", "active"), ("withdraw", "withdrawn")):
        submit_form(lead, page, f"/lead/people/{who}", {"action": action})
        assert person(store, "ada").account.state == state
    assert store.judgments() == []
    assert submit_form(lead, page, f"/lead/people/{who}", {"action": "resume"}).status_code == 400
    last = submit_form(lead, lead.get("/lead"), "/lead/people/1", {"action": "pause"})
    assert "last lead" in last.text


def test_inviting_and_changing_a_password(store: Store, lead: httpx.Client) -> None:
    who = add_person(store, "ada")
    page = submit_form(lead, lead.get("/lead"), "/lead/invite", {"role": "annotator"})
    assert "http://testserver/join/" in page.text
    page = submit_form(lead, lead.get("/lead"), f"/lead/people/{who}", {"action": "password"})
    link = page.text.partition("<code>http://testserver")[2].partition("<")[0]
    with TestClient(app_of(site_of(store, Clock(NOW)))) as other:
        submit_form(other, other.get(link), "", {"password": "another long one"}, url=link)
        assert log_in(other, "ada", PASSWORD).status_code == 401
        assert log_in(other, "ada", "another long one").status_code == 200


def test_settling_an_answer(store: Store, lead: httpx.Client) -> None:
    [id_] = store.add_tasks([task()])
    page = lead.get(f"/lead/tasks/{id_}")
    action = f"/lead/tasks/{id_}/gold"
    assert "every reply needs a rank" in submit_form(lead, page, action, {"rank-0": "1"}).text.lower()
    submit_form(lead, page, action, {"rank-0": "1", "rank-1": "3", "rank-2": "3"})
    assert store.gold() == {f"{id_}:gold": (1, 2, 2)}
    assert "settled" in lead.get(f"/lead/tasks/{id_}").text
    assert lead.get("/lead/tasks/nowhere").status_code == 404


def test_the_export_is_the_native_form(store: Store, lead: httpx.Client, tmp_path: Path) -> None:
    store.add_tasks([task(number) for number in range(3)])
    work(store, add_person(store, "ada"), (1, 2, 2), Rules(repeat_share=0, gold_share=0))
    path = tmp_path / "export.jsonl"
    path.write_text(lead.get("/lead/export.jsonl?revisions=all").text)
    assert [judgment_from_row(row) for row in read_rows(path)] == store.judgments()
    assert "ada" not in {json.loads(line)["annotator"] for line in path.read_text().splitlines()}


def test_new_guidelines(lead: httpx.Client) -> None:
    page = lead.get("/lead/guidelines")
    assert "Rank by taste." in submit_form(lead, page, "/lead/guidelines", {"text": "Rank by taste."}).text
    assert submit_form(lead, page, "/lead/guidelines", {"text": " "}).status_code == 400
