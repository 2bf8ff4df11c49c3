"""The annotator's pages as a browser without JavaScript sees them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from rlhf.annotate.accounts import invite, set_state
from rlhf.annotate.guidelines import publish
from rlhf.annotate.store import Store
from rlhf.annotate.tasks import Task
from rlhf.annotate.web import Site
from rlhf.feedback.judgments import CompletionShown
from support.annotating import NOW, PASSWORD, add_person, sqlite, task
from support.annotation_client import Clock, Form, app_of, log_in, replies, site_of, submit_form

JSON = {"Accept": "application/json"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(sqlite(tmp_path))
    yield store
    store.close()


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def site(store: Store, clock: Clock) -> Site:
    return site_of(store, clock)


@pytest.fixture
def client(site: Site, store: Store) -> Iterator[httpx.Client]:
    add_person(store, "ada")
    with TestClient(app_of(site)) as client:
        yield client


@pytest.fixture
def ada(client: httpx.Client) -> httpx.Client:
    assert log_in(client, "ada").status_code == 200
    return client


def another(site: Site, name: str) -> TestClient:
    client = TestClient(app_of(site))
    log_in(client, name)
    return client


def test_ranking_with_a_tie(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    page = ada.get("/")
    shown = replies(page)
    done = submit_form(ada, page, "/answer", {"rank-0": "2", "rank-1": "1", "rank-2": "2", "reason": "so so"})
    assert "Saved." in done.text
    [judgment] = store.judgments()
    assert [judgment.texts[index] for index in judgment.order_shown] == shown
    assert [judgment.ranks[index] for index in judgment.order_shown] == [2, 1, 2]
    assert judgment.reason == "so so"
    assert len(judgment.guideline_version) == 12
    assert judgment.ms_visible is None


def test_an_incomplete_ranking_comes_back_with_what_was_chosen(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    page = ada.get("/")
    again = submit_form(ada, page, "/answer", {"rank-1": "3", "flag": "unclear", "reason": "<b>"})
    assert again.status_code == 422
    assert "Reply A and C have no rank yet." in again.text
    kept = Form(again.text, "/answer").fields
    assert (kept["rank-1"], kept["flag"]) == ("3", "unclear")
    assert kept["key"] == Form(page.text, "/answer").fields["key"]
    assert "&lt;b&gt;</textarea>" in again.text
    assert store.counts().judgments == 0


def test_a_pair_with_strength(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task(number, 2, kind="pair") for number in range(3)])
    for preference in ("-3", "0", "1"):
        submit_form(ada, ada.get("/"), "/answer", {"preference": preference})
    found = [(tuple(each.ranks[index] for index in each.order_shown), each.strength) for each in store.judgments()]
    assert found == [((1, 2), 3), ((1, 1), 0), ((2, 1), 1)]


def test_best_and_worst(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task(completions=9, kind="best-worst")])
    page = ada.get("/")
    assert "cannot be the same" in submit_form(ada, page, "/answer", {"best": "3", "worst": "3"}).text
    submit_form(ada, page, "/answer", {"best": "3", "worst": "0"})
    [judgment] = store.judgments()
    assert [judgment.ranks[index] for index in judgment.order_shown] == [3, 2, 2, 1, 2, 2, 2, 2, 2]


def test_text_of_models_is_escaped(store: Store, ada: httpx.Client) -> None:
    evil = "<script>alert(1)</script>{{ 7*7 }}"
    store.add_tasks([Task(evil, (CompletionShown(evil, policy_version="secret-v9"), CompletionShown("b")))])
    page = ada.get("/")
    assert "<script>alert" not in page.text
    assert page.text.count("&lt;script&gt;alert(1)&lt;/script&gt;{{ 7*7 }}") == 2
    assert "secret-v9" not in page.text


def test_every_answer_has_the_headers(ada: httpx.Client) -> None:
    for path in ("/", "/static/page.css", "/nowhere"):
        headers = ada.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/answers", "/guidelines"):
        text = ada.get(path).text
        assert " style=" not in text
        assert " onclick=" not in text


def test_a_submit_twice_is_one_judgment(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    page = ada.get("/")
    ranks = {"rank-0": "1", "rank-1": "2", "rank-2": "3"}
    first = submit_form(ada, page, "/answer", ranks, headers=JSON).json()
    again = submit_form(ada, page, "/answer", ranks, headers=JSON).json()
    assert first == again == {"saved": 1, "next": "/?saved=1"}
    other = submit_form(ada, page, "/answer", {**ranks, "rank-0": "3"}, headers=JSON)
    assert other.status_code == 409
    assert other.json()["link"] == "/answers/1"
    assert store.counts().judgments == 1


def test_undo_is_a_revision(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    page = ada.get("/")
    submit_form(ada, page, "/answer", {"rank-0": "1", "rank-1": "2", "rank-2": "3"})
    edit = ada.get("/answers/last")
    before = Form(edit.text, "/answer").fields
    assert [before[f"rank-{place}"] for place in range(3)] == ["1", "2", "3"]
    assert replies(edit) == replies(page)
    submit_form(ada, edit, "/answer", {"rank-0": "3"})
    [judgment] = store.judgments()
    assert judgment.revision == 1
    assert [judgment.ranks[index] for index in judgment.order_shown] == [2, 1, 2]
    assert "Changed once" in ada.get("/answers").text


def test_skipping_asks_why(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    page = ada.get("/")
    assert "Say why you skip" in submit_form(ada, page, "/answer", {}, url="/skip").text
    submit_form(ada, page, "/answer", {"flag": "unclear"}, url="/skip")
    assert store.counts().skipped == 1
    assert "Nothing to rank yet" in ada.get("/").text
    back = submit_form(ada, ada.get("/answers"), "/answers/1/take-back", {})
    assert len(replies(back)) == 3


def test_nobody_sees_anothers_task_or_answer(store: Store, site: Site, ada: httpx.Client) -> None:
    add_person(store, "bob")
    store.add_tasks([task(need=2)])
    page = ada.get("/")
    submit_form(ada, page, "/answer", {"rank-0": "1", "rank-1": "1", "rank-2": "1", "reason": "between us"})
    bob = another(site, "bob")
    assert bob.get("/answers/1").status_code == 400
    theirs = bob.get("/")
    forged = submit_form(bob, theirs, "/answer", {"assignment": "1", "rank-0": "1", "rank-1": "1", "rank-2": "1"})
    assert forged.status_code == 400
    for path in ("/", "/answers", "/guidelines"):
        assert "between us" not in bob.get(path).text
    assert bob.get("/lead").status_code == 403
    assert bob.get("/lead/export.jsonl").status_code == 403


def test_a_form_without_the_sessions_token_is_refused(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    page = ada.get("/")
    ranks = {"rank-0": "1", "rank-1": "1", "rank-2": "1"}
    assert submit_form(ada, page, "/answer", {**ranks, "csrf": "guess"}).status_code == 403
    cross = submit_form(ada, page, "/answer", ranks, headers={"Sec-Fetch-Site": "cross-site"})
    assert cross.status_code == 403
    assert store.counts().judgments == 0


def test_login_without_its_pages_cookie_is_refused(client: httpx.Client) -> None:
    fields = {"name": "ada", "password": PASSWORD, "csrf": "", "next": "/"}
    assert client.post("/login", data=fields).status_code == 403


def test_cookies(site: Site, client: httpx.Client) -> None:
    page = client.get("/login")
    answer = submit_form(client, page, "/login", {"name": "ada", "password": PASSWORD}, follow_redirects=False)
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "secure" not in cookie
    assert Site(site.store, site.settings.model_copy(update={"public_url": "https://x.org"})).cookie == "__Host-rlhf"


def test_without_login_there_is_only_the_login(client: httpx.Client) -> None:
    for path in ("/", "/answers", "/lead", "/guidelines"):
        assert client.get(path, follow_redirects=False).headers["location"].startswith("/login")
    assert client.get("/answers/last", headers=JSON).status_code == 401


def test_the_login_goes_back_only_to_this_site(client: httpx.Client) -> None:
    page = client.get("/login?next=//evil.example/")
    answer = submit_form(client, page, "/login", {"name": "ada", "password": PASSWORD}, follow_redirects=False)
    assert answer.headers["location"] == "/"


def test_guessing_passwords_ends_soon(store: Store, site: Site, clock: Clock, client: httpx.Client) -> None:
    for _ in range(site.settings.login_failures):
        assert log_in(client, "ada", "wrong password").status_code == 401
    assert log_in(client, "ada").status_code == 429
    clock.now += 16 * 60
    assert log_in(client, "ada").status_code == 200


def test_an_invite_makes_one_account(store: Store, client: httpx.Client) -> None:
    link = f"/join/{invite(store.database, 'annotator', NOW)}"
    page = client.get(link)
    short = submit_form(client, page, "", {"name": "eve", "password": "short"}, url=link)
    assert "10 to 200 characters" in short.text
    assert "taken" in submit_form(client, page, "", {"name": "ada", "password": PASSWORD}, url=link).text
    submit_form(client, page, "", {"name": "eve", "password": PASSWORD}, url=link)
    assert "used already" in submit_form(client, page, "", {"name": "eva", "password": PASSWORD}, url=link).text
    assert log_in(client, "eve").url.path == "/"


def test_an_old_invite_does_not_work(store: Store, clock: Clock, client: httpx.Client) -> None:
    token = invite(store.database, "lead", NOW)
    clock.now += 8 * 24 * 3600
    assert client.get(f"/join/{token}").status_code == 404


def test_a_session_ends(store: Store, clock: Clock, ada: httpx.Client) -> None:
    assert ada.get("/answers").status_code == 200
    clock.now += 73 * 3600
    assert ada.get("/answers", follow_redirects=False).status_code == 303


def test_logging_out_ends_the_session_on_the_server(ada: httpx.Client) -> None:
    cookies = dict(ada.cookies)
    submit_form(ada, ada.get("/"), "/logout", {})
    ada.cookies.update(cookies)
    assert ada.get("/", follow_redirects=False).status_code == 303


def test_who_is_withdrawn_is_out_at_once(store: Store, ada: httpx.Client) -> None:
    set_state(store.database, 1, "withdrawn")
    assert ada.get("/", follow_redirects=False).status_code == 303
    assert log_in(ada, "ada").status_code == 401


def test_too_many_answers_are_slowed_down(store: Store, tmp_path: Path, clock: Clock) -> None:
    add_person(store, "ada")
    client = TestClient(app_of(site_of(store, clock, submits_per_minute=1)))
    log_in(client, "ada")
    store.add_tasks([task(0), task(1)])
    ranks = {"rank-0": "1", "rank-1": "1", "rank-2": "1"}
    assert submit_form(client, client.get("/"), "/answer", ranks).status_code == 200
    assert submit_form(client, client.get("/"), "/answer", ranks).status_code == 429


def test_new_guidelines_are_announced_until_they_are_read(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    assert "New here?" in ada.get("/").text
    submit_form(ada, ada.get("/guidelines"), "/guidelines", {})
    assert "Read the guidelines" not in ada.get("/").text
    publish(store.database, "Be <kind>.", NOW)
    assert "The guidelines have changed." in ada.get("/").text
    assert "Be &lt;kind&gt;." in ada.get("/guidelines").text


def test_a_lease_is_kept_while_the_page_is_open(store: Store, clock: Clock, site: Site, ada: httpx.Client) -> None:
    add_person(store, "bob")
    store.add_tasks([task()])
    page = ada.get("/")
    clock.now += site.settings.lease_s - 1
    assert submit_form(ada, page, "/answer", {}, url="/renew").json() == {"held": True}
    clock.now += site.settings.lease_s - 1
    bob = another(site, "bob")
    assert "Nothing to rank yet" in bob.get("/").text
    clock.now += 2
    assert len(replies(bob.get("/"))) == 3
    assert submit_form(ada, page, "/answer", {}, url="/renew").json() == {"held": False}


def test_a_form_that_no_page_of_ours_has_is_refused(store: Store, ada: httpx.Client) -> None:
    store.add_tasks([task()])
    page = ada.get("/")
    assert submit_form(ada, page, "/answer", {"reason": "x" * 70_000}).status_code == 413
    assert submit_form(ada, page, "/answer", {"fence": "one"}).status_code == 400
    assert "no rank yet" in submit_form(ada, page, "/answer", {"rank-0": "4", "rank-1": "-1", "rank-2": "²"}).text
    assert ada.get("/healthz").text == "ok"
