"""Settings of human feedback's data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.settings import Section


class FeedbackSettings(Section):
    snapshot: Path | None = None
    """Folder of the snapshot that import adds to, and that the others read. None: the run's feedback/."""
    source: str = ""
    """What to import: a file (.jsonl, .jsonl.gz, .parquet, .json), a folder of these, or the name of a Hugging Face
    dataset as "name", "name:config" or "name:config:split"."""
    format: str = "native"
    """Form of what is imported or exported; docs/feedback.md has the table of them."""
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
    rounds: NonNegativeInt = 0
    """Rounds of new judgments while PPO runs, at steps spread evenly over it; 0: none. Each refreshes the reward model
    with completions of the newest policy."""
    prompts: PositiveInt = 64
    """Prompts whose completions are judged in a round."""
    candidates: float = Field(default=2.0, ge=1)
    """Prompts that are sampled for each of these; the reward model's members say which are worth asking about."""
    completions: int = Field(default=4, ge=2, le=9)
    """Completions of each prompt."""
    random_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of a round's prompts that is drawn at random and kept for measuring: the round does not train on them, the
    next one does."""
    active: bool = True
    """Draw the others by how much their judgments would tell of the reward model's members (BALD). Given up for random
    ones by itself where that was no better over two rounds, and with a single member."""
    audit_pairs: NonNegativeInt = 32
    """Prompts on which the newest policy is compared with that of the round before, by the same judges, blindly. 0: no
    audit."""
    people: bool = False
    """People judge, on the page of `rlhf annotate`; otherwise the simulated annotators of the section `rank`."""
    deadline_s: PositiveFloat = 604800.0
    """A round goes on with the judgments there are, once people have had this long."""
    step_timeout_s: PositiveFloat = 3600.0
    """Until the next round a step of PPO may take this long, unless PPO is held; then the rounds end with an error."""
    hold: bool | None = None
    """PPO waits while a round is judged and the reward model refreshed. None: if people judge."""
    promote_margin: NonNegativeFloat = 0.0
    """A refreshed reward model is taken into service if it orders the newest policy's completions as the judges do, in
    a share of the pairs that is less by this at most."""
    threads: PositiveInt = 1
    """CPU threads of a refresh, beside PPO."""
    nice: int = Field(default=10, ge=0, le=19)
    """How far PPO goes first, as nice(1) has it."""
    seed: NonNegativeInt = 0
    """Seed of the prompts, of sampling and of selection."""
