"""What simulated annotators care about: a rule, or a classifier's word on sentiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf.data.rows import is_data_file
from rlhf.data.sentiment import SentimentClassifier
from rlhf.reward.rules import ScoreItem, load_rule

Utility = Callable[[Sequence[ScoreItem]], NDArray[np.float64]]
"""[N], higher is liked better."""

# Annotators who went by rare words would share no taste: there a classifier has learnt chance.
_INVERSE_PENALTY = 0.1


def load_utility(source: str | Path, seed: int) -> Utility:
    """The log-odds of a classifier that is fitted from a data file, or the rule of that name.

    Raises:
        DataError, RuleError: see `SentimentClassifier.fit` and `load_rule`.
    """
    if not is_data_file(source):
        rule = load_rule(str(source))
        return lambda items: rule.score(items).astype(np.float64)
    classifier = SentimentClassifier.fit(source, seed, _INVERSE_PENALTY)
    return lambda items: classifier.log_odds([item.prompt + item.completion for item in items])
