"""The annotator's pages: a task, its submit and skip, one's own answers, the guidelines."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, HTTPException, Request
from starlette.datastructures import FormData
from starlette.responses import JSONResponse, Response

from rlhf.annotate import answers, assigning, guidelines
from rlhf.annotate.accounts import Person
from rlhf.annotate.answers import FLAGS, Form
from rlhf.annotate.forms import STRENGTHS, Given, Incomplete, given_before, read_answer, read_given, shown
from rlhf.annotate.progress import own_progress
from rlhf.annotate.tables import DONE, LATE, Assignment
from rlhf.annotate.web import (
    Posted,
    Site,
    SiteDep,
    Somebody,
    number_of,
    page,
    text_of,
    to,
    wants_json,
)
from rlhf.errors import RequestError

router = APIRouter()


@router.get("/")
def next_task(request: Request, site: SiteDep, who: Somebody, saved: int = 0) -> Response:
    assignment = assigning.claim(site.database, who.id, site.rules, site.now())
    if assignment is None:
        return page(request, "nothing.html", who, own=own_progress(site.database, who.id, site.now()), saved=saved)
    return _task_page(request, site, who, assignment, saved=saved)


@router.post("/answer")
def submit(request: Request, site: SiteDep, who: Somebody, form: Posted) -> Response:
    sent = _form(form)
    revision = number_of(form, "revision")
    assignment = _mine(site, who, sent.assignment_id)
    try:
        answer = read_answer(form, assignment, text_of(form, "guideline_version")[:64])
    except Incomplete as error:
        if wants_json(request):
            return JSONResponse({"problem": str(error)}, 422)
        given = read_given(form, len(assignment.order_shown))
        return _task_page(request, site, who, assignment, given, revision, problem=str(error), sent=sent)
    receipt = answers.submit(
        *(site.database, who.id, sent, answer),
        revision=revision,
        now=site.now(),
        per_minute=site.settings.submits_per_minute,
    )
    after = "/answers" if revision else "/?saved=1"
    return JSONResponse({"saved": receipt.judgment_id, "next": after}) if wants_json(request) else to(after)


@router.post("/skip")
def skip(request: Request, site: SiteDep, who: Somebody, form: Posted) -> Response:
    sent = _form(form)
    assignment = _mine(site, who, sent.assignment_id)
    given = read_given(form, len(assignment.order_shown))
    if not (given.flags or given.reason):
        problem = "Say why you skip: mark something, or write a few words."
        return _task_page(request, site, who, assignment, given, problem=problem, sent=sent, open_marks=True)
    answers.skip(site.database, who.id, sent, flags=given.flags, reason=given.reason, now=site.now())
    return to("/")


@router.post("/renew")
def renew(site: SiteDep, who: Somebody, form: Posted) -> JSONResponse:
    sent = _form(form)
    until = site.now() + site.settings.lease_s
    return JSONResponse({"held": assigning.renew(site.database, who.id, sent.assignment_id, sent.fence, until)})


@router.get("/answers")
def own_answers(request: Request, site: SiteDep, who: Somebody) -> Response:
    with site.database.reading() as session:
        found = answers.recent(session, who.id)
        rows = {each.id: answers.answers_of(session, who.id, each.id) for each in found}
    return page(request, "answers.html", who, assignments=found, rows=rows)


@router.get("/answers/last")
def last_answer(site: SiteDep, who: Somebody) -> Response:
    """What "undo" opens: the last answer, to be changed; the list, if it was skipped."""
    with site.database.reading() as session:
        found = answers.recent(session, who.id, limit=1)
    is_answer = bool(found) and found[0].state in (DONE, LATE)
    return to(f"/answers/{found[0].id}" if is_answer else "/answers")


@router.get("/answers/{assignment_id}")
def change_answer(request: Request, site: SiteDep, who: Somebody, assignment_id: int) -> Response:
    assignment = _mine(site, who, assignment_id)
    with site.database.reading() as session:
        rows = answers.answers_of(session, who.id, assignment_id)
    if not rows:
        return to("/")
    return _task_page(request, site, who, assignment, given_before(assignment, rows[0]), len(rows))


@router.post("/answers/{assignment_id}/take-back")
def take_back(site: SiteDep, who: Somebody, form: Posted, assignment_id: int) -> Response:
    assigning.take_back(site.database, who.id, assignment_id, site.now(), site.settings.lease_s)
    return to("/")


@router.get("/guidelines")
def read_guidelines(request: Request, site: SiteDep, who: Somebody) -> Response:
    return page(request, "guidelines.html", who, guideline=guidelines.newest(site.database))


@router.post("/guidelines")
def guidelines_read(site: SiteDep, who: Somebody, form: Posted) -> Response:
    guidelines.note_read(site.database, who.id, text_of(form, "version")[:64])
    return to("/")


def _task_page(
    request: Request,
    site: Site,
    who: Person,
    assignment: Assignment,
    given: Given | None = None,
    revision: int = 0,
    *,
    problem: str = "",
    sent: Form | None = None,
    saved: int = 0,
    open_marks: bool = False,
) -> Response:
    """
    Args:
        sent: the form that came back incomplete; its page keeps fence and key.
        saved: whether the answer before this task was saved just now.
    """
    form = sent or Form(assignment.id, assignment.fence, secrets.token_urlsafe(16))
    return page(
        *(request, "task.html", who, 422 if problem else 200),
        task=shown(assignment, given),
        form=form,
        revision=revision,
        problem=problem,
        saved=saved,
        open_marks=open_marks,
        flags=FLAGS,
        strengths=STRENGTHS,
        guideline=guidelines.newest(site.database),
        own=own_progress(site.database, who.id, site.now()),
        all=site.board(site.now()),
        renew_s=site.settings.lease_s / 3,
    )


def _form(form: FormData) -> Form:
    key = text_of(form, "key")
    if not 8 <= len(key) <= 64:
        raise HTTPException(400, "The form has no key.")
    return Form(number_of(form, "assignment"), number_of(form, "fence"), key)


def _mine(site: Site, who: Person, assignment_id: int) -> Assignment:
    with site.database.reading() as session:
        found = session.get(Assignment, assignment_id)
    if found is None or found.account_id != who.id:
        raise RequestError("this task was not given to you")
    return found
