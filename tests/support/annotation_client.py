"""A browser without JavaScript, as far as the page needs one: keeps cookies, reads forms, submits them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import httpx

from rlhf.annotate.app import create_app
from rlhf.annotate.guidelines import BUILT_IN, publish
from rlhf.annotate.settings import AnnotateSettings
from rlhf.annotate.store import Store
from rlhf.annotate.web import Site
from support.annotating import PASSWORD


class Clock:
    """The time that a site believes in."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def site_of(store: Store, now: Clock, **settings: object) -> Site:
    publish(store.database, BUILT_IN, 0.0)
    fields: dict[str, Any] = {"repeat_share": 0.0, "gold_share": 0.0, "submits_per_minute": 1000, **settings}
    return Site(store, AnnotateSettings(**fields), "http://testserver", now)


def app_of(site: Site) -> Any:
    return create_app(site)


class Form(HTMLParser):
    """The hidden and filled-in fields of the form with this action."""

    def __init__(self, html: str, action: str) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self._action, self._inside = action, False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self._inside = given.get("action", "") == self._action
        is_choice = given.get("type") in ("radio", "checkbox")
        if self._inside and tag == "input" and "name" in given and (not is_choice or "checked" in given):
            self.fields[str(given["name"])] = given.get("value") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False


def submit_form(
    client: httpx.Client, page: httpx.Response, action: str, fields: Mapping[str, Any], **others: Any
) -> httpx.Response:
    """Fills in a page's form and submits it; `url` where it goes elsewhere than its action says."""
    url = others.pop("url", action or str(page.url))
    return client.post(url, data={**Form(page.text, action).fields, **fields}, **others)


def log_in(client: httpx.Client, name: str, password: str = PASSWORD) -> httpx.Response:
    return submit_form(client, client.get("/login"), "/login", {"name": name, "password": password})


def replies(page: httpx.Response) -> list[str]:
    """The replies as shown."""
    return re.findall(
        r'(?:Reply [A-I]</(?:legend|h2)>)\s*<div class="text" dir="auto">(.*?)</div>', page.text, re.DOTALL
    )
