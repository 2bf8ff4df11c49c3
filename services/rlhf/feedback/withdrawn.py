"""Who has withdrawn, on the run's annotation page or from its snapshot, which alone knows people from elsewhere.

Both are asked wherever judgments are used, so that no row of theirs that was exported, imported or judged before is
used again.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.feedback.judgments import Judgment
from rlhf.feedback.snapshots import withdrawn_from
from rlhf.settings.run import Settings

_log = logging.getLogger(__name__)


def withdrawn(settings: Settings) -> frozenset[str]:
    """Names that judgments are signed with.

    Raises:
        SettingsError, StorageError, Unavailable: there is a page, and its database cannot be had.
    """
    from_snapshot = withdrawn_from(snapshot_folder(settings))
    return from_snapshot | _page().withdrawn_on_page(settings) if _has_page(settings) else from_snapshot


def snapshot_folder(settings: Settings) -> Path:
    return settings.feedback.snapshot or settings.paths.feedback


def withdraw_there(settings: Settings, annotator: str) -> bool:
    """Withdraws an annotator on the page too; whether it knows them.

    Raises:
        RequestError: it is the last lead.
        SettingsError, StorageError, Unavailable: as `withdrawn`.
    """
    return _has_page(settings) and bool(_page().withdraw_on_page(settings, annotator))


def without_withdrawn(settings: Settings, judgments: Iterable[Judgment]) -> list[Judgment]:
    """Those of everybody else, in their order.

    Raises:
        SettingsError, StorageError, Unavailable: as `withdrawn`.
    """
    out, found = withdrawn(settings), list(judgments)
    kept = [judgment for judgment in found if judgment.annotator not in out]
    if len(kept) < len(found):
        _log.info("left out %d judgments of who has withdrawn", len(found) - len(kept))
    return kept


def _has_page(settings: Settings) -> bool:
    return bool(settings.annotate.database) or settings.paths.annotations.exists()


def _page() -> Any:
    # By its name, as the command line does: the page depends on this part.
    return importlib.import_module("rlhf.annotate.withdrawing")
