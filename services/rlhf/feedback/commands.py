"""`rlhf feedback import | export | stats | withdraw`: a run's snapshot of judgments, from and to other tools."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import DataError, SettingsError
from rlhf.feedback.agreement import pair_agreement_alpha, pairwise_agreement
from rlhf.feedback.exchange import dataset_of, export_judgments, import_judgments
from rlhf.feedback.formats.form import Options
from rlhf.feedback.judgments import Judgment
from rlhf.feedback.snapshots import Snapshot, is_snapshot, joined, load_snapshot, snapshot_of, withdraw, write_snapshot
from rlhf.feedback.withdrawn import snapshot_folder, withdraw_there, withdrawn
from rlhf.settings.loader import with_overrides
from rlhf.settings.run import Settings


def import_(settings: Settings) -> None:
    """Adds what the source holds to the snapshot, which it makes if there is none.

    Raises:
        SettingsError, DataError: see `import_judgments`; or an id that is another judgment's.
    """
    section, folder = settings.feedback, snapshot_folder(settings)
    if not section.source:
        raise SettingsError("feedback.source: say what to import with --source")
    found = import_judgments(section.source, section.format, options_of(settings), section.on_bad)
    before = load_snapshot(folder) if is_snapshot(folder) else Snapshot(())
    joint = joined(before, found.judgments, section.dataset or dataset_of(section.source))
    after = _without_withdrawn(settings, joint)
    write_snapshot(folder, after)
    print(
        f"imported {len(found.judgments)} judgments from {section.source}: {len(found.bad)} bad rows left out, "
        f"{found.duplicates} duplicates, {len(joint.judgments) - len(before.judgments)} new"
    )
    print(_described(folder, after))


def export(settings: Settings) -> None:
    """
    Raises:
        SettingsError, DataError: see `export_judgments`; or there is no snapshot.
    """
    section = settings.feedback
    if section.out is None:
        raise SettingsError("feedback.out: say where to export to with --out")
    snapshot = _read(settings)
    rows = export_judgments(section.out, snapshot.judgments, section.format, options_of(settings), snapshot.sha256)
    print(f"wrote {rows} rows to {section.out}, and what they are made of to {section.out}.card.md")


def stats(settings: Settings) -> None:
    """
    Raises:
        DataError: there is no snapshot.
    """
    snapshot = _without_withdrawn(settings, _found(settings))
    print(_described(snapshot_folder(settings), snapshot))
    for name, value in figures(snapshot.judgments).items():
        print(f"{name:<22}{_shown(value)}")


def withdraw_(settings: Settings) -> None:
    """Takes every row of an annotator out, here and on the run's annotation page, and trains the reward model again
    from what is left, if that is asked for.

    Raises:
        SettingsError: no annotator is named.
        DataError: there is no snapshot, or nobody of this name in it or on the page.
        RequestError: the page has no other lead.
    """
    annotator, folder = settings.feedback.annotator, snapshot_folder(settings)
    if not annotator:
        raise SettingsError("feedback.annotator: say whom to withdraw with --annotator")
    on_page = withdraw_there(settings, annotator)
    if on_page:
        print(f"{annotator} is withdrawn on the annotation page")
        if not is_snapshot(folder) and not settings.feedback.retrain:
            return
    before = load_snapshot(folder) if on_page and is_snapshot(folder) else _read(settings)
    after = withdraw(before, annotator)
    if not on_page and annotator not in {judgment.annotator for judgment in before.judgments}:
        raise DataError(f"has no judgments of {annotator}; rlhf feedback stats lists the annotators", path=folder)
    write_snapshot(folder, after)
    print(f"withdrew {len(before.judgments) - len(after.judgments)} judgments of {annotator}")
    print(_described(folder, after))
    again = f"reward_model.comparisons={folder}"
    if settings.feedback.retrain:
        # By its name, as the command line does: nothing here depends on the trainer.
        importlib.import_module("rlhf.preference.train").run(with_overrides(settings, [again]))
        print(f"trained the reward model again: {settings.reward_model.out or settings.paths.reward_model}")
    else:
        print(f"train the reward model again: rlhf reward-model --run {settings.run.name} --comparisons {folder}")


def options_of(settings: Settings) -> Options:
    section = settings.feedback
    return Options(section.dataset, section.prompt_key, section.chosen_key, section.rejected_key, section.tokenizer)


def figures(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """What a snapshot holds, and how far its annotators agree (None where nothing was judged twice)."""
    pairs = [(a, b) for each in judgments for i, a in enumerate(each.ranks) for b in each.ranks[:i]]
    return {
        "judgments": len(judgments),
        "prompts": len({each.prompt_id for each in judgments}),
        "pairs": len(pairs),
        "ties": sum(a == b for a, b in pairs),
        "pairwise agreement": pairwise_agreement(judgments),
        "Krippendorff's alpha": pair_agreement_alpha(judgments),
        "annotators": Counter(each.annotator for each in judgments),
        "sources": Counter(each.source for each in judgments),
        "policy versions": Counter(each.policy_version or "not given" for each in judgments),
    }


def _read(settings: Settings) -> Snapshot:
    """Once it has lost the rows of who has withdrawn on the page since it was written."""
    found = _found(settings)
    if (left := _without_withdrawn(settings, found)) != found:
        write_snapshot(snapshot_folder(settings), left)
    return left


def _found(settings: Settings) -> Snapshot:
    folder = snapshot_folder(settings)
    if is_snapshot(folder):
        return load_snapshot(folder)
    if settings.feedback.snapshot is None and settings.paths.comparisons.exists():
        raise DataError(
            f"there is no snapshot yet; rlhf feedback import --run {settings.run.name} "
            f"--source {settings.paths.comparisons} makes one",
            path=folder,
        )
    raise DataError("there is no snapshot; rlhf feedback import makes one", path=folder)


def _without_withdrawn(settings: Settings, snapshot: Snapshot) -> Snapshot:
    """Without the rows of who has withdrawn on the run's annotation page."""
    here = {judgment.annotator for judgment in snapshot.judgments}
    out = sorted(here & withdrawn(settings))
    left = snapshot_of(snapshot.judgments, snapshot.sources, [*snapshot.withdrawn, *out])
    if out:
        count = len(snapshot.judgments) - len(left.judgments)
        print(f"left out {count} judgments of {', '.join(out)}, withdrawn on the annotation page")
    return left


def _described(folder: Path, snapshot: Snapshot) -> str:
    out = f", without {', '.join(snapshot.withdrawn)}" if snapshot.withdrawn else ""
    return f"snapshot {snapshot.sha256} in {folder}: {len(snapshot.judgments)} judgments{out}"


def _shown(value: Any) -> str:
    if isinstance(value, Counter):
        most = value.most_common(8)
        rest = [f"… {len(value)} in all"] if len(value) > len(most) else []
        return ", ".join([*(f"{name} {count}" for name, count in most), *rest])
    return "nothing was judged twice" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
