"""Settings of a run's data: split from a folder of real texts, or made."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt, field_validator

from rlhf.settings import Section


class DataSettings(Section):
    """Real texts, split into what each stage may see."""

    folder: Path | None = None
    """Folder with corpus.jsonl, rows {"text"}, and labelled.jsonl, rows {"text", "label"}; required."""
    heldout_texts: PositiveInt = 4000
    """Texts kept from pretraining: for perplexity, and for the prompts below."""
    prompts: PositiveInt = 12000
    """First words of texts, for sampling and PPO."""
    heldout_prompts: PositiveInt = 512
    """First words of held-out texts, for the final evaluation alone."""
    validation_prompts: PositiveInt = 512
    """First words of other held-out texts, to choose settings by."""
    prompt_words: tuple[PositiveInt, PositiveInt] = (3, 7)
    """Fewest and most words of a prompt."""
    seed: NonNegativeInt = 0
    """Seed of the order of texts, and so of every split."""

    @field_validator("prompt_words")
    @classmethod
    def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("the fewest words come first")
        return value


class WorldSettings(Section):
    """Small film reviews from a grammar, for a run that needs no download."""

    texts: PositiveInt = 20000
    """Reviews for pretraining."""
    heldout_texts: PositiveInt = 500
    """Reviews for perplexity."""
    prompts: PositiveInt = 4000
    """Beginnings of reviews for sampling and PPO."""
    heldout_prompts: PositiveInt = 256
    """Beginnings of reviews that only evaluation sees; none is among `prompts`."""
    labelled: PositiveInt = 4000
    """Labelled reviews from which the judge is fitted."""
    seed: NonNegativeInt = 0
    """Seed of everything in it."""
