"""The web application: pages, and what a person reads when something went wrong."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from rlhf.annotate import pages_lead, pages_people, pages_rank
from rlhf.annotate.answers import Conflict
from rlhf.annotate.web import HERE, Guard, LoginNeeded, Site, page, to_login, wants_json
from rlhf.errors import Overloaded, RequestError, RlhfError

log = logging.getLogger(__name__)


def create_app(site: Site) -> FastAPI:
    """The application for one database and its settings."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = site
    app.add_middleware(Guard)
    app.mount("/static", StaticFiles(directory=HERE / "static"), "static")
    for pages in (pages_people, pages_rank, pages_lead):
        app.include_router(pages.router)
    app.add_api_route("/healthz", _healthy, include_in_schema=False)
    app.add_exception_handler(LoginNeeded, _log_in_first)
    app.add_exception_handler(RlhfError, _explain)
    app.add_exception_handler(HTTPException, _refuse)
    return app


def _healthy(request: Request) -> Response:
    """Answers while the database does."""
    site: Site = request.app.state.site
    with site.database.reading() as session:
        session.connection()
    return Response("ok")


def _log_in_first(request: Request, error: Exception) -> Response:
    if wants_json(request):
        return JSONResponse({"problem": "You are logged out. Log in in another window, then submit again."}, 401)
    return to_login(request)


def _explain(request: Request, error: Exception) -> Response:
    """An error of ours as a page, or as what the page's script shows."""
    status = 409 if isinstance(error, Conflict) else 400 if isinstance(error, RequestError) else 503
    status = 429 if isinstance(error, Overloaded) else status
    if status == 503:
        log.error("%s %s: %s", request.method, request.url.path, error)
    text = str(error)[:1].upper() + str(error)[1:] + "."
    link = f"/answers/{error.assignment_id}" if isinstance(error, Conflict) else "/"
    if wants_json(request):
        return JSONResponse({"problem": text, "link": link}, status)
    return page(request, "message.html", None, status, title="This was not saved", text=text, link=link)


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "There is no such page." if error.status_code == 404 else error.detail
    if wants_json(request):
        return JSONResponse({"problem": text, "link": "/"}, error.status_code)
    return page(request, "message.html", None, error.status_code, title="That did not work", text=text, link="/")
