"""What annotators are asked to do: plain text, versioned by its hash; every judgment says which version it followed."""

from __future__ import annotations

import hashlib

from sqlalchemy import select, update

from rlhf.annotate.database import Database
from rlhf.annotate.tables import Account, Guideline
from rlhf.errors import RequestError

BUILT_IN = """\
Read the prompt, then every reply to its end. Put the replies in order, the best first.

Better is the reply that does what was asked, is true as far as you can tell, and is clear. Length is no merit.
Replies that are equally good get the same rank. You need not find a difference where there is none.

Judge what is written, not who may have written it. Do not discuss tasks that others have yet to answer.

Skip a task that you cannot judge, and say why. Mark a task whose replies are all bad, but order them all the same.
Press U, or choose "Answers", to change an answer that you have given.
"""


def version_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def publish(database: Database, text: str, now: float) -> str:
    """Makes a text the guidelines, unless it has been before, and returns its version.

    Raises:
        RequestError: the text is empty.
    """
    text = text.replace("\r\n", "\n").strip() + "\n"
    if not text.strip():
        raise RequestError("the guidelines are empty")
    version = version_of(text)
    with database.writing() as session:
        if session.get(Guideline, version) is None:
            session.add(Guideline(version=version, text=text, created_at=now))
    return version


def newest(database: Database) -> Guideline:
    """
    Raises:
        RequestError: none has been published.
    """
    with database.reading() as session:
        found = session.scalars(select(Guideline).order_by(Guideline.created_at.desc()).limit(1)).one_or_none()
    if found is None:
        raise RequestError("no guidelines have been published")
    return found


def note_read(database: Database, account_id: int, version: str) -> None:
    with database.writing() as session:
        session.execute(update(Account).where(Account.id == account_id).values(guideline_version=version))
