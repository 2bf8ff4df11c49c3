"""Login, logout, and the page that an invite link opens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlhf.annotate import accounts
from rlhf.annotate.web import (
    Posted,
    PostedByNobody,
    SiteDep,
    Somebody,
    local_path,
    page_for_nobody,
    text_of,
    to,
    token_of,
)
from rlhf.errors import NotAuthorized, Overloaded, RequestError

router = APIRouter()


@router.get("/login")
def login_page(request: Request, next: str = "/") -> Response:
    return page_for_nobody(request, "login.html", next=local_path(next), name="", problem="")


@router.post("/login")
def log_in(request: Request, site: SiteDep, form: PostedByNobody) -> Response:
    name, back = text_of(form, "name"), local_path(text_of(form, "next"))
    host = request.client.host if request.client else ""
    seconds = site.settings.session_hours * 3600
    try:
        token = accounts.log_in(
            *(site.database, name, text_of(form, "password"), host, site.now()),
            session_s=seconds,
            failures=site.settings.login_failures,
        )
    except (NotAuthorized, Overloaded) as error:
        status = 429 if isinstance(error, Overloaded) else 401
        return page_for_nobody(request, "login.html", status, next=back, name=name, problem=str(error))
    response = to(back)
    site.set_cookie(response, site.cookie, token, seconds)
    return response


@router.post("/logout")
def log_out(request: Request, site: SiteDep, who: Somebody, form: Posted) -> Response:
    accounts.log_out(site.database, token_of(request))
    response = to("/login")
    response.delete_cookie(site.cookie, secure=site.is_secure, httponly=True, samesite="lax")
    return response


@router.get("/join/{token}")
def join_page(request: Request, site: SiteDep, token: str) -> Response:
    return _join_page(request, site, token)


@router.post("/join/{token}")
def join(request: Request, site: SiteDep, token: str, form: PostedByNobody) -> Response:
    try:
        accounts.join(site.database, token, text_of(form, "name"), text_of(form, "password"), site.now())
    except RequestError as error:
        return _join_page(request, site, token, problem=str(error), name=text_of(form, "name"))
    return to("/login")


def _join_page(request: Request, site: SiteDep, token: str, problem: str = "", name: str = "") -> Response:
    invitation = accounts.invited(site.database, token, site.now())
    if invitation is None:
        return page_for_nobody(request, "message.html", 404, title="This link does not work",
                               text="It has been used already or is over a week old. Ask for a new one.")  # fmt: skip
    known = accounts.name_of(site.database, invitation.account_id) if invitation.account_id else ""
    return page_for_nobody(
        *(request, "join.html", 422 if problem else 200),
        role=invitation.role,
        known=known,
        name=known or name,
        problem=problem,
        min_password=accounts.MIN_PASSWORD,
    )
