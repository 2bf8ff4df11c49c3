"""Snapshots: a fixed set of judgments with a hash, which a reward model names as what it was trained on.

On disk a folder of `judgments.jsonl` and `snapshot.json`. The hash is of the rows alone, so taking out an annotator
gives the snapshot that there would have been without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import DataError
from rlhf.feedback.judgments import Judgment, OnBad, read_judgments, write_judgments
from rlhf.models.folders import read_json, replacing_folder, write_json

JUDGMENTS, FACTS = "judgments.jsonl", "snapshot.json"


@dataclass(frozen=True)
class Snapshot:
    judgments: tuple[Judgment, ...]
    """Sorted by `judgment_id`, each of which is there once. `snapshot_of` makes it so."""
    sources: tuple[str, ...] = ()
    """Names of what was imported, sorted."""
    withdrawn: tuple[str, ...] = ()
    """Annotators whose rows are out and stay out, sorted."""

    @property
    def sha256(self) -> str:
        return snapshot_sha256(self.judgments)


def snapshot_sha256(judgments: Iterable[Judgment]) -> str:
    """Of the rows as canonical JSON (sorted names, no spaces, UTF-8, one a line), in the order of their ids."""
    digest = hashlib.sha256()
    for judgment in sorted(judgments, key=lambda each: each.judgment_id):
        row = json.dumps(asdict(judgment), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()


def snapshot_of(judgments: Iterable[Judgment], sources: Iterable[str] = (), withdrawn: Iterable[str] = ()) -> Snapshot:
    """
    Raises:
        DataError: two different judgments have one id.
    """
    out = set(withdrawn)
    rows: dict[str, Judgment] = {}
    for judgment in judgments:
        if judgment.annotator not in out and rows.setdefault(judgment.judgment_id, judgment) != judgment:
            raise DataError(
                f"two different judgments are both {judgment.judgment_id}; import one of them under another name "
                "(feedback.dataset)"
            )
    return Snapshot(tuple(rows[name] for name in sorted(rows)), tuple(sorted(set(sources))), tuple(sorted(out)))


def joined(snapshot: Snapshot, judgments: Iterable[Judgment], source: str) -> Snapshot:
    """With more judgments; those of withdrawn annotators stay out."""
    return snapshot_of([*snapshot.judgments, *judgments], [*snapshot.sources, source], snapshot.withdrawn)


def withdraw(snapshot: Snapshot, annotator: str) -> Snapshot:
    """Without any row of this annotator, now and after later imports."""
    return snapshot_of(snapshot.judgments, snapshot.sources, [*snapshot.withdrawn, annotator])


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """
    Raises:
        StorageError: it cannot be written; what was there is unchanged.
    """
    with replacing_folder(folder) as tmp:
        write_judgments(tmp / JUDGMENTS, snapshot.judgments)
        write_json(tmp / FACTS, _facts(snapshot))


def read_snapshot(folder: Path) -> Snapshot:
    """
    Raises:
        DataError: no snapshot, or its rows are not those that its hash was made of.
    """
    if not is_snapshot(folder):
        raise DataError(f"is no snapshot: it has no {FACTS}", path=folder)
    facts = read_json(folder / FACTS)
    judgments = read_judgments(folder / JUDGMENTS) if facts["rows"] else []
    snapshot = snapshot_of(judgments, facts["sources"], facts["withdrawn"])
    if _facts(snapshot) != facts:
        raise DataError(f"holds other rows than {FACTS} says; import the judgments again", path=folder)
    return snapshot


def withdrawn_from(folder: Path) -> frozenset[str]:
    """Whose rows are out and stay out; nobody's where there is no snapshot."""
    return frozenset(read_json(folder / FACTS)["withdrawn"] if is_snapshot(folder) else ())


def is_snapshot(folder: str | Path) -> bool:
    return (Path(folder) / FACTS).is_file()


def load_snapshot(source: str | Path, on_bad: OnBad = "stop") -> Snapshot:
    """A snapshot's folder, checked against its hash; or any source of `read_judgments`, as a snapshot.

    Raises:
        DataError: as these two.
    """
    if is_snapshot(source):
        return read_snapshot(Path(source))
    return snapshot_of(read_judgments(source, on_bad), [Path(source).name])


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "sha256": snapshot.sha256,
        "rows": len(snapshot.judgments),
        "sources": list(snapshot.sources),
        "withdrawn": list(snapshot.withdrawn),
    }
