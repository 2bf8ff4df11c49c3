"""What every page shares: who is asking, protection against forged forms, templates, headers."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import quote

from fastapi import Depends, HTTPException, Request
from fastapi.templating import Jinja2Templates
from starlette.datastructures import FormData, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.annotate.accounts import Person, person
from rlhf.annotate.assigning import Rules
from rlhf.annotate.database import Database
from rlhf.annotate.progress import Board
from rlhf.annotate.settings import AnnotateSettings
from rlhf.annotate.store import Store

HERE = Path(__file__).parent
MAX_BODY_BYTES = 64 * 1024
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Not no-store: then a browser could not go back to a form whose submit has failed.
    "Cache-Control": "private, no-cache",
}


@dataclass(frozen=True)
class Site:
    """What the pages work with; `request.app.state.site`."""

    store: Store
    settings: AnnotateSettings
    address: str = ""
    """Where it listens, for links, unless the settings name another."""
    now: Callable[[], float] = time.time
    templates: Jinja2Templates = field(default_factory=lambda: _templates())
    board: Board = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "board", Board(self.store.database))

    @property
    def database(self) -> Database:
        return self.store.database

    @property
    def rules(self) -> Rules:
        its = self.settings
        return Rules(its.lease_s, its.repeat_share, its.repeat_gap, its.gold_share)

    @property
    def url(self) -> str:
        return (self.settings.public_url or self.address).rstrip("/")

    @property
    def is_secure(self) -> bool:
        return self.url.startswith("https://")

    @property
    def cookie(self) -> str:
        """Name of the session's cookie; browsers keep the prefix's promises only over TLS."""
        return "__Host-rlhf" if self.is_secure else "rlhf"

    def set_cookie(self, response: Response, name: str, value: str, max_age_s: float | None = None) -> None:
        response.set_cookie(
            name,
            value,
            max_age=None if max_age_s is None else int(max_age_s),
            httponly=True,
            secure=self.is_secure,
            samesite="lax",
        )


class LoginNeeded(Exception):
    """Nobody is logged in."""


def site_of(request: Request) -> Site:
    return cast(Site, request.app.state.site)


def token_of(request: Request) -> str:
    return request.cookies.get(site_of(request).cookie, "")


def somebody(request: Request) -> Person:
    """
    Raises:
        LoginNeeded: nobody is logged in.
    """
    site, token = site_of(request), token_of(request)
    who = person(site.database, token, site.now()) if token else None
    if who is None:
        raise LoginNeeded
    return who


def lead(who: Annotated[Person, Depends(somebody)]) -> Person:
    if who.role != "lead":
        raise HTTPException(403, "This page is the lead's.")
    return who


async def posted(request: Request, who: Annotated[Person, Depends(somebody)]) -> FormData:
    """A form that came from a page of ours, in this person's session."""
    form = await request.form()
    _check_origin(request)
    if not hmac.compare_digest(text_of(form, "csrf"), who.csrf):
        raise HTTPException(403, "This form is from an earlier login. Reload the page and submit it again.")
    return form


async def posted_by_nobody(request: Request) -> FormData:
    """A form of those pages that need no login: it carries what the cookie of its page says."""
    form = await request.form()
    _check_origin(request)
    expected = request.cookies.get("rlhf_form", "")
    if not expected or not hmac.compare_digest(text_of(form, "csrf"), expected):
        raise HTTPException(403, "The browser did not send this page's cookie back. Reload the page and try again.")
    return form


SiteDep = Annotated[Site, Depends(site_of)]
Somebody = Annotated[Person, Depends(somebody)]
Lead = Annotated[Person, Depends(lead)]
Posted = Annotated[FormData, Depends(posted)]
PostedByNobody = Annotated[FormData, Depends(posted_by_nobody)]


def text_of(form: FormData, name: str) -> str:
    """A field's text; empty where it is missing. Half surrogate pairs, which no database takes, are replaced."""
    value = form.get(name, "")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def number_of(form: FormData, name: str) -> int:
    """A whole number that a page of ours put into its form."""
    try:
        return int(text_of(form, name))
    except ValueError as error:
        raise HTTPException(400, f"The form's field {name} is no number.") from error


def wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")


def page(request: Request, template: str, who: Person | None = None, status: int = 200, /, **context: Any) -> Response:
    shown = {"who": who, "csrf": who.csrf if who else "", **context}
    return site_of(request).templates.TemplateResponse(request, template, shown, status_code=status)


def page_for_nobody(request: Request, template: str, status: int = 200, /, **context: Any) -> Response:
    """A page whose form needs no login; its cookie shows later that the form was ours."""
    csrf = request.cookies.get("rlhf_form") or secrets.token_urlsafe(24)
    response = page(request, template, None, status, **{**context, "csrf": csrf})
    site_of(request).set_cookie(response, "rlhf_form", csrf)
    return response


def to(path: str) -> RedirectResponse:
    return RedirectResponse(path, status_code=303)


def to_login(request: Request) -> RedirectResponse:
    back = request.url.path if request.method == "GET" else "/"
    return to(f"/login?next={quote(back)}")


def local_path(text: str) -> str:
    """A path of this site, whatever the address bar said."""
    is_local = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable()
    return text if is_local else "/"


def _check_origin(request: Request) -> None:
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "This form came from another site.")


def _templates() -> Jinja2Templates:
    templates = Jinja2Templates(HERE / "templates")
    templates.env.trim_blocks = templates.env.lstrip_blocks = True
    versions = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in (HERE / "static").iterdir()}
    templates.env.globals["static"] = lambda name: f"/static/{name}?{versions[name]}"
    return templates


class Guard:
    """Adds the headers to every answer, and refuses bodies that no form of ours has."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if _is_too_large(scope):
            await Response("The form is too large.", 413)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def _is_too_large(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    return b"transfer-encoding" in headers or not length.isdigit() or int(length) > MAX_BODY_BYTES
