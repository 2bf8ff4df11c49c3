"""The lead's pages: how the work goes and how far people agree, who takes part, settled answers, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from fastapi import APIRouter, HTTPException, Request
from sqlalchemy import select
from starlette.responses import Response, StreamingResponse

from rlhf.annotate import accounts, guidelines
from rlhf.annotate.forms import LETTERS
from rlhf.annotate.quality import report
from rlhf.annotate.store import task_of
from rlhf.annotate.tables import TaskRow
from rlhf.annotate.tasks import dense, gold
from rlhf.annotate.web import Lead, Posted, Site, SiteDep, page, text_of, to
from rlhf.errors import RequestError

router = APIRouter(prefix="/lead")
STATES = {"pause": "paused", "resume": "active", "withdraw": "withdrawn"}


@router.get("")
def overview(request: Request, site: SiteDep, who: Lead) -> Response:
    return page(request, "lead.html", who, report=report(site.store, site.now()), link="", link_for="")


@router.post("/invite")
def invite(request: Request, site: SiteDep, who: Lead, form: Posted) -> Response:
    role = "lead" if text_of(form, "role") == "lead" else "annotator"
    link = f"{site.url}/join/{accounts.invite(site.database, role, site.now())}"
    return _with_link(request, site, who, link, f"a new {role}")


@router.post("/people/{account_id}")
def change_person(request: Request, site: SiteDep, who: Lead, form: Posted, account_id: int) -> Response:
    action = text_of(form, "action")
    if action == "password":
        name = accounts.name_of(site.database, account_id)
        link = f"{site.url}/join/{accounts.invite(site.database, '', site.now(), account_id)}"
        return _with_link(request, site, who, link, f"a new password of {name}")
    if action not in STATES:
        raise HTTPException(400, "There is no such action.")
    accounts.set_state(site.database, account_id, STATES[action])
    return to("/lead#people")


@router.get("/tasks/{task_id}")
def look_at_task(request: Request, site: SiteDep, who: Lead, task_id: str) -> Response:
    """A task with everybody's answers, by pseudonym."""
    row = _task(site, task_id)
    return page(
        *(request, "lead_task.html", who),
        task=row,
        judgments=site.store.judgments([task_id]),
        letters=LETTERS[: len(row.completions)],
        settled=site.store.gold().get(f"{task_id}:gold"),
    )


@router.post("/tasks/{task_id}/gold")
def settle(site: SiteDep, who: Lead, form: Posted, task_id: str) -> Response:
    """Makes the lead's ranking of a task one that people are compared with, unannounced."""
    task = task_of(_task(site, task_id))
    try:
        ranks = dense(tuple(int(text_of(form, f"rank-{index}")) for index in range(len(task.completions))))
    except ValueError as error:
        raise RequestError("every reply needs a rank") from error
    if len(set(ranks)) == 1:
        raise RequestError("a settled answer needs replies that are not all equal")
    site.store.add_tasks([gold(task, ranks)])
    return to(f"/lead/tasks/{task_id}")


@router.get("/guidelines")
def edit_guidelines(request: Request, site: SiteDep, who: Lead) -> Response:
    return page(request, "lead_guidelines.html", who, guideline=guidelines.newest(site.database))


@router.post("/guidelines")
def publish_guidelines(site: SiteDep, who: Lead, form: Posted) -> Response:
    guidelines.publish(site.database, text_of(form, "text"), site.now())
    return to("/guidelines")


@router.get("/export.jsonl")
def export(site: SiteDep, who: Lead, revisions: str = "newest") -> Response:
    """Judgments in the native form, one a line. `revisions=all`: also what was changed later, and what came late."""
    everything = revisions == "all"
    judgments = site.store.judgments(all_revisions=everything, late=everything)
    lines: Iterator[str] = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in judgments)
    headers = {"Content-Disposition": "attachment; filename=judgments.jsonl"}
    return StreamingResponse(lines, media_type="application/jsonl", headers=headers)


def _with_link(request: Request, site: Site, who: Lead, link: str, link_for: str) -> Response:
    """Shown once: only its hash is kept."""
    return page(request, "lead.html", who, report=report(site.store, site.now()), link=link, link_for=link_for)


def _task(site: Site, task_id: str) -> TaskRow:
    with site.database.reading() as session:
        row = session.scalars(select(TaskRow).where(TaskRow.id == task_id)).one_or_none()
    if row is None:
        raise HTTPException(404, "There is no such task.")
    return row
