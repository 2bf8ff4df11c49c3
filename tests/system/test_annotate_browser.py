"""The page in Debian's Chromium: ranking by keyboard, reloads, a server that dies, no JavaScript, and axe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from rlhf.annotate.store import Store
from support.annotating import PASSWORD, add_person, sqlite, task
from support.annotation_server import AnnotationServer

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

CHROMIUM = Path("/usr/bin/chromium")
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM.exists(), f"{CHROMIUM} is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(sqlite(tmp_path))
    for name, role in (("ada", "annotator"), ("lea", "lead")):
        add_person(store, name, role)
    yield store
    store.close()


@pytest.fixture
def server(tmp_path: Path, store: Store) -> Iterator[AnnotationServer]:
    server = AnnotationServer(tmp_path, database=sqlite(tmp_path), repeat_share=0, gold_share=0)
    server.start()
    server.wait_until_open()
    yield server
    assert server.stop() == 0


def opened(browser: Browser, server: AnnotationServer, name: str = "ada", **context: object) -> Page:
    """Logged in."""
    page = browser.new_context(**context).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(30_000)
    page.goto(server.url)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{server.url}/")
    return page


def chosen(page: Page) -> list[str]:
    return [str(each.get_attribute("value")) for each in page.locator(".choices input:checked").all()]


def test_a_person_ranks_by_keyboard_reloads_and_loses_the_server(
    browser: Browser, server: AnnotationServer, store: Store
) -> None:
    store.add_tasks([task(0), task(1)])
    page = opened(browser, server)
    texts = page.locator(".reply .text").all_inner_texts()
    page.keyboard.press("1")  # of the first reply; the focus goes on to the next without a rank
    page.keyboard.press("2")
    page.reload()
    assert page.locator(".reply .text").all_inner_texts() == texts
    assert chosen(page) == ["1", "2"]
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("2")  # a tie of the second and the third
    expect(page.locator("#state")).to_have_text("A, then B = C")
    server.kill()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#state")).to_contain_text("Not saved yet, retrying")
    server.start()
    expect(page.locator("#state")).to_have_text("Saved.")
    expect(page.locator(".prompt .text")).to_have_text("prompt 1")
    [judgment] = store.judgments(all_revisions=True, late=True)
    assert [judgment.texts[index] for index in judgment.order_shown] == texts
    assert [judgment.ranks[index] for index in judgment.order_shown] == [1, 2, 2]
    assert judgment.ms_visible


def test_an_acknowledgement_that_is_lost_saves_nothing_twice(
    browser: Browser, server: AnnotationServer, store: Store
) -> None:
    """The server has saved the answer and dies before it can say so."""
    store.add_tasks([task()])
    page = opened(browser, server)
    attempts = []

    def lose_the_first(route: Route) -> None:
        response = route.fetch()
        attempts.append(response.json())
        if len(attempts) == 1:
            route.abort()
        else:
            route.fulfill(response=response)

    page.route("**/answer", lose_the_first)
    for rank in "213":
        page.keyboard.press(rank)
    page.keyboard.press("Enter")  # the focus is on the button by now
    page.get_by_role("heading", name="That was all for now").wait_for()
    assert len(attempts) == 2
    assert attempts[0] == attempts[1]
    assert store.counts().judgments == 1


def test_keys_for_the_other_kinds_undo_and_skip(browser: Browser, server: AnnotationServer, store: Store) -> None:
    store.add_tasks([task(0, 2, kind="pair"), task(1, 4, kind="best-worst"), task(2)])
    page = opened(browser, server)
    page.keyboard.press("6")
    page.keyboard.press("Control+Enter")
    page.get_by_role("heading", name="Choose the best").wait_for()
    for key in ("j", "j", "b", "j", "w", "Control+Enter"):
        page.keyboard.press(key)
    page.get_by_role("heading", name="Rank the replies").wait_for()
    page.keyboard.press("u")
    page.get_by_role("heading", name="Change your answer").wait_for()
    for key in ("k", "b", "Control+Enter"):
        page.keyboard.press(key)
    page.wait_for_url("**/answers")
    page.goto(server.url)
    page.keyboard.press("s")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Skip this task").press("Enter")
    page.get_by_role("heading", name="That was all for now").wait_for()
    pair, extremes = store.judgments()
    assert ([pair.ranks[index] for index in pair.order_shown], pair.strength) == ([2, 1], 2)
    assert [extremes.ranks[index] for index in extremes.order_shown] == [1, 2, 3, 2]
    assert extremes.revision == 1
    assert store.counts().skipped == 1


def test_letters_can_be_switched_off(browser: Browser, server: AnnotationServer, store: Store) -> None:
    store.add_tasks([task()])
    page = opened(browser, server)
    page.keyboard.press("?")
    page.get_by_label("Single-letter keys are on").uncheck()
    page.get_by_role("button", name="Close").click()
    page.reload()
    page.keyboard.press("1")
    assert chosen(page) == []


def test_without_javascript(browser: Browser, server: AnnotationServer, store: Store) -> None:
    store.add_tasks([task()])
    page = opened(browser, server, java_script_enabled=False)
    for letter, rank in (("A", 2), ("B", 1), ("C", 2)):
        page.get_by_label(f"Reply {letter}, rank {rank}").check(force=True)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("status")).to_have_text("Saved.")
    [judgment] = store.judgments()
    assert [judgment.ranks[index] for index in judgment.order_shown] == [2, 1, 2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, server: AnnotationServer, store: Store, scheme: str) -> None:
    ids = store.add_tasks([task(0, 2, kind="pair"), task(1, 4, kind="best-worst"), task(2, 9, need=2)])
    page = opened(browser, server, "lea", color_scheme=scheme)
    found = {"task, pair": violations(page)}
    page.keyboard.press("4")
    page.keyboard.press("Control+Enter")
    page.get_by_role("heading", name="Choose the best").wait_for()
    found["task, best-worst"] = violations(page)
    for key in ("b", "j", "j", "w", "Control+Enter"):
        page.keyboard.press(key)
    page.get_by_role("heading", name="Rank the replies").wait_for()
    found["task, rank"] = violations(page)
    page.keyboard.press("?")
    found["help"] = violations(page)
    page.keyboard.press("Escape")
    paths = ("/answers", "/answers/1", "/guidelines", "/lead", f"/lead/tasks/{ids[2]}", "/lead/guidelines", "/nowhere")
    for path in paths:
        page.goto(server.url + path)
        found[path] = violations(page)
    page.context.clear_cookies()
    page.goto(f"{server.url}/login")
    found["/login"] = violations(page)
    assert {where: what for where, what in found.items() if what} == {}


def test_a_phone_needs_no_scrolling_sideways(browser: Browser, server: AnnotationServer, store: Store) -> None:
    store.add_tasks([task(0, 9)])
    page = opened(browser, server, "lea", viewport=PHONE)
    for path in ("/", "/answers", "/lead", "/guidelines"):
        page.goto(server.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path


def violations(page: Page) -> list[str]:
    response = Axe().run(page).response
    assert response["passes"], "axe has not looked at anything"
    return [f"{each['id']}: {each['nodes'][0]['html'][:120]}" for each in response["violations"]]
