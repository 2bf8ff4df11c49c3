"""Settings of human feedback's data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rlhf.settings import Section


class FeedbackSettings(Section):
    snapshot: Path | None = None
    """Folder of the snapshot that import adds to, and that the others read. None: the run's feedback/."""
    source: str = ""
    """What to import: a file (.jsonl, .jsonl.gz, .parquet, .json), a folder of these, or the name of a Hugging Face
    dataset as "name", "name:config" or "name:config:split"."""
    format: str = "native"
    """Form of what is imported or exported; the README has the table of them."""
    dataset: str = ""
    """Name of what is imported, in ids and as the policy version "unknown:<dataset>". Empty: the source's own."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What a row that cannot be used does: stop the import, or be named and left out."""
    out: Path | None = None
    """What to export to: a file (.jsonl, .jsonl.gz, .parquet, .json), or a folder for datasets.load_from_disk."""
    prompt_key: str = "prompt"
    """Name of the prompt in OpenRLHF's form."""
    chosen_key: str = "chosen"
    """Name of the preferred completion in OpenRLHF's form."""
    rejected_key: str = "rejected"
    """Name of the other completion in OpenRLHF's form."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, for forms of token ids."""
    annotator: str = ""
    """Pseudonym of the annotator to withdraw."""
    retrain: bool = False
    """Train the run's reward model again once the annotator is withdrawn."""
