"""Withdrawal beyond the page: who has withdrawn there, and withdrawing somebody from elsewhere.

`rlhf.feedback.withdrawn` calls both by name, for it is the page that depends on that part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import select

from rlhf.annotate.accounts import set_state
from rlhf.annotate.store import Store, open_store
from rlhf.annotate.tables import WITHDRAWN, Account
from rlhf.settings.run import Settings


def withdrawn_on_page(settings: Settings) -> frozenset[str]:
    """Pseudonyms.

    Raises:
        SettingsError, StorageError, Unavailable: the run's database cannot be had.
    """
    with _opened(settings) as store, store.database.reading() as session:
        return frozenset(session.scalars(select(Account.pseudonym).where(Account.state == WITHDRAWN)))


def withdraw_on_page(settings: Settings, pseudonym: str) -> bool:
    """As the lead's page does it; False: the page knows nobody who signs so.

    Raises:
        RequestError: it is the last lead.
        SettingsError, StorageError, Unavailable: the run's database cannot be had.
    """
    with _opened(settings) as store:
        with store.database.reading() as session:
            found = session.scalars(select(Account).where(Account.pseudonym == pseudonym)).one_or_none()
        if found is not None and found.state != WITHDRAWN:
            set_state(store.database, found.id, WITHDRAWN)
        return found is not None


@contextmanager
def _opened(settings: Settings) -> Iterator[Store]:
    store = open_store(settings)
    try:
        yield store
    finally:
        store.close()
