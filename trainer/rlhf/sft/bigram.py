"""An interpolated bigram model: what a language model must beat to have learned more than pairs of tokens."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

_WEIGHTS = np.linspace(0.05, 0.95, 19)


def bigram_perplexity(train: Tokens, heldout: Tokens, vocab_size: int) -> float:
    """Perplexity per token of `heldout[1:]`, each given the token before, under counts of `train`.

    P(b | a) = w · n(a, b) / n(a) + (1 - w) · (n(b) + 1) / (N + V), with w chosen on the last tenth of `train` under
    counts of the rest. Where a was never followed by anything, w is 0. Jelinek and Mercer 1980, one weight.

    Args:
        train, heldout: [N] token streams of at least two tokens.
    """
    cut = max(2, len(train) * 9 // 10)
    fitted = _probabilities(train[:cut], train[cut - 1 :], vocab_size)
    weight = max(_WEIGHTS, key=lambda w: _log_likelihood(*fitted, w))
    pair, single = _probabilities(train, heldout, vocab_size)
    return math.exp(-_log_likelihood(pair, single, weight) / len(single))


def _probabilities(train: Tokens, stream: Tokens, vocab_size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each of `stream[1:]`: relative frequency after its predecessor (NaN: never seen), and smoothed frequency."""
    codes, counts = np.unique(_pair_codes(train, vocab_size), return_counts=True)
    wanted = _pair_codes(stream, vocab_size)
    place = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
    together = np.where(codes[place] == wanted, counts[place], 0)
    followed = np.bincount(train[:-1], minlength=vocab_size)[stream[:-1]]
    occurrences = np.bincount(train, minlength=vocab_size)[stream[1:]]
    pair = np.where(followed > 0, together / np.maximum(followed, 1), np.nan)
    return pair, (occurrences + 1) / (len(train) + vocab_size)


def _log_likelihood(pair: NDArray[np.float64], single: NDArray[np.float64], weight: float) -> float:
    mixed = np.where(np.isnan(pair), single, weight * pair + (1 - weight) * single)
    return float(np.log(mixed).sum())


def _pair_codes(stream: Tokens, vocab_size: int) -> NDArray[np.int64]:
    return stream[:-1].astype(np.int64) * vocab_size + stream[1:]
