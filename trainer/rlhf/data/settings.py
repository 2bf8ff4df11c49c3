"""Settings of the synthetic world."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from rlhf.settings import Section


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
