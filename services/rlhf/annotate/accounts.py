"""People: accounts by invite link, passwords (argon2), sessions kept here and not in the cookie, limits on guessing.

Tokens of links and cookies are stored as their hashes, so that who reads the database cannot log in with it.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from rlhf.annotate.assigning import free_slot, release_held
from rlhf.annotate.database import Database
from rlhf.annotate.tables import ACTIVE, DONE, WITHDRAWN, Account, Assignment, Invite, Login, LoginFailure
from rlhf.errors import NotAuthorized, Overloaded, RequestError

MIN_PASSWORD = 10
MAX_PASSWORD = 200
INVITE_S = 7 * 24 * 3600.0
_WINDOW_S = 15 * 60.0
_PER_HOST = 4
"""Times as many failures from one host as for one name: people share networks."""
_hasher = PasswordHasher()


@dataclass(frozen=True)
class Person:
    """Who is logged in, by which session."""

    id: int
    name: str
    role: str
    state: str
    guideline_version: str
    csrf: str


def invite(database: Database, role: str, now: float, account_id: int | None = None) -> str:
    """The token of a link that works once within a week; with an account, for a new password of it."""
    token = secrets.token_urlsafe(24)
    with database.writing() as session:
        session.add(Invite(token_hash=_hash(token), role=role, account_id=account_id, expires_at=now + INVITE_S))
    return token


def invited(database: Database, token: str, now: float) -> Invite | None:
    """What a link is for; None: it was never given, has been used, or is over a week old."""
    with database.reading() as session:
        found = session.get(Invite, _hash(token))
        return found if found and found.used_at is None and found.expires_at > now else None


def name_of(database: Database, account_id: int) -> str:
    with database.reading() as session:
        return session.scalars(select(Account.name).where(Account.id == account_id)).one()


def join(database: Database, token: str, name: str, password: str, now: float) -> None:
    """Uses a link: makes the account, or gives it another password and ends its sessions.

    Raises:
        RequestError: the link, the name or the password will not do.
    """
    name = name.strip()
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise RequestError(f"the password must have {MIN_PASSWORD} to {MAX_PASSWORD} characters")
    hashed = _hasher.hash(password)
    try:
        with database.writing() as session:
            unused = (Invite.token_hash == _hash(token), Invite.used_at.is_(None), Invite.expires_at > now)
            invitation = session.scalars(database.locked(select(Invite).where(*unused))).one_or_none()
            if invitation is None:
                raise RequestError("this link has been used already or is too old; ask for a new one")
            invitation.used_at = now
            if invitation.account_id is not None:
                session.execute(update(Account).where(Account.id == invitation.account_id).values(password_hash=hashed))
                session.execute(delete(Login).where(Login.account_id == invitation.account_id))
            else:
                session.add(_new_account(name, invitation.role, hashed, now))
    except IntegrityError as error:
        raise RequestError(f"the name {name} is taken; choose another") from error


def log_in(
    database: Database, name: str, password: str, host: str, now: float, *, session_s: float, failures: int
) -> str:
    """The token for the session's cookie.

    Raises:
        NotAuthorized: no such name with this password.
        Overloaded: too many wrong ones lately.
    """
    _check_failures(database, name, host, now, failures)
    with database.reading() as session:
        account = session.scalars(select(Account).where(Account.name == name.strip())).one_or_none()
    if not _is_right(account, password) or account is None or account.state == WITHDRAWN:
        with database.writing() as session:
            session.add(LoginFailure(name=name[:200], host=host, at=now))
        raise NotAuthorized("there is no account of this name with this password")
    token = secrets.token_urlsafe(32)
    login = Login(
        token_hash=_hash(token), account_id=account.id, csrf=secrets.token_urlsafe(24), expires_at=now + session_s
    )
    with database.writing() as session:
        session.execute(delete(Login).where(Login.expires_at < now))
        session.execute(delete(LoginFailure).where(LoginFailure.at < now - 30 * 24 * 3600))
        session.add(login)
    return token


def person(database: Database, token: str, now: float) -> Person | None:
    """Whose session this is; None: nobody's, or it is over."""
    with database.reading() as session:
        login = session.get(Login, _hash(token))
        if login is None or login.expires_at < now or login.account.state == WITHDRAWN:
            return None
        account = login.account
        return Person(account.id, account.name, account.role, account.state, account.guideline_version, login.csrf)


def log_out(database: Database, token: str) -> None:
    with database.writing() as session:
        session.execute(delete(Login).where(Login.token_hash == _hash(token)))


def set_state(database: Database, account_id: int, state: str) -> None:
    """Pauses somebody (no new tasks; what they answered stays), withdraws them, or takes either back.

    Withdrawn: no session, no judgment of theirs is given out, and others answer their tasks again.

    Raises:
        RequestError: it is the last lead.
    """
    with database.writing() as session:
        account = session.scalars(database.locked(select(Account).where(Account.id == account_id))).one_or_none()
        if account is None:
            raise RequestError("there is no such account")
        leads = select(func.count()).where(Account.role == "lead", Account.state == ACTIVE, Account.id != account_id)
        if account.role == "lead" and state != ACTIVE and session.scalars(leads).one() == 0:
            raise RequestError("the last lead cannot be paused or withdrawn")
        if account.state == WITHDRAWN and state != WITHDRAWN:
            raise RequestError("others have been given this person's tasks; make a new account instead")
        account.state = state
        if state != ACTIVE:
            release_held(database, session, account_id)
        if state == WITHDRAWN:
            session.execute(delete(Login).where(Login.account_id == account_id))
            mine = (Assignment.account_id == account_id, Assignment.state == DONE, Assignment.slot.is_not(None))
            answered = select(Assignment).where(*mine).order_by(Assignment.task_seq)
            for assignment in session.scalars(database.locked(answered)).all():
                free_slot(session, assignment, DONE)


def has_lead(database: Database) -> bool:
    with database.reading() as session:
        return session.scalars(select(func.count()).where(Account.role == "lead")).one() > 0


def _new_account(name: str, role: str, password_hash: str, now: float) -> Account:
    if not 1 <= len(name) <= 60 or not name.isprintable():
        raise RequestError("the name must have 1 to 60 characters")
    return Account(
        name=name, pseudonym=f"a-{secrets.token_hex(4)}", role=role, password_hash=password_hash, created_at=now
    )


def _check_failures(database: Database, name: str, host: str, now: float, most: int) -> None:
    lately = LoginFailure.at > now - _WINDOW_S
    with database.reading() as session:
        of_name = session.scalars(select(func.count()).where(lately, LoginFailure.name == name[:200])).one()
        of_host = session.scalars(select(func.count()).where(lately, LoginFailure.host == host)).one()
    if of_name >= most or of_host >= _PER_HOST * most:
        raise Overloaded("too many wrong passwords; try again in a quarter of an hour", retry_after_s=_WINDOW_S)


def _is_right(account: Account | None, password: str) -> bool:
    try:
        return _hasher.verify(_nobodys_hash() if account is None else account.password_hash, password[:MAX_PASSWORD])
    except (VerificationError, InvalidHashError):
        return False


@cache
def _nobodys_hash() -> str:
    """Checked where there is no such account, so that the time an answer takes does not tell."""
    return _hasher.hash(secrets.token_hex(16))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
