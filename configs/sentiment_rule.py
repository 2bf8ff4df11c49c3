"""A reward rule: praise, counted by words, wanted or unwanted by the prompt's row.

A rule is a function of a list of items; it answers one finite number for each, in their order. `item.metadata` holds
the other fields of the prompt's row, as strings: {"prompt": "The film was", "wanted": "negative"}.
"""

from collections.abc import Sequence

from rlhf.reward.rules import ScoreItem

GOOD = frozenset(
    {
        "beautiful",
        "brilliant",
        "enjoyable",
        "excellent",
        "fine",
        "funny",
        "good",
        "great",
        "lovely",
        "moving",
        "superb",
        "wonderful",
    }
)
BAD = frozenset(
    {
        "awful",
        "bad",
        "boring",
        "disappointing",
        "dreadful",
        "dull",
        "horrible",
        "poor",
        "silly",
        "terrible",
        "tiresome",
        "weak",
    }
)


def sentiment(items: Sequence[ScoreItem]) -> list[float]:
    """From -1 to 1 each."""
    return [_score(item) for item in items]


def _score(item: ScoreItem) -> float:
    words = [word.strip(".,;:!?\"'()").lower() for word in item.completion.split()]
    praise, blame = sum(word in GOOD for word in words), sum(word in BAD for word in words)
    balance = (praise - blame) / max(1, praise + blame)
    return -balance if item.metadata.get("wanted") == "negative" else balance
