"""Forward passes of fixed shape, so that an item's answer depends on nothing but the item (`run.deterministic`).

A matrix product of another size is summed in another order, and its last bits differ. Which items share a batch is
chance: it depends on who asked when. So every pass has the same number of rows, and a length that each item decides by
itself, rounded up; where fewer items are there, fillers take the other places. Two of them always do, a longest and a
shortest one: the first gives the batch its length, and without the second a batch of full rows would need no mask and
take another way through attention.

On CPU this needs one thread: with more, matrix products and attention are divided among them at places that the shape
decides, and each part's edge is rounded in its own way (seen with MKL on AMD's AVX-512: 5 to 11 rows, two threads).
`check_alike` tries it on the machine at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rlhf.errors import SettingsError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

ROWS = 16
"""Of every pass."""
LENGTH_STEP = 16
"""Lengths are rounded up to a multiple of it."""
SHORTEST = 2
"""Tokens of the shortest filler: one to read, and one to predict."""


def in_fixed_shapes(
    forward: Callable[[Sequence[Item]], Sequence[Answer]],
    *,
    length: Callable[[Item], int],
    filler: Callable[[int], Item],
    longest: int | None,
) -> Callable[[Sequence[Item]], list[Answer]]:
    """The same function in passes of fixed shape.

    Args:
        forward: pads its items to the longest of them.
        length: tokens of an item.
        filler: an item of that many tokens.
        longest: tokens that the model reads at most; None: it knows no limit.
    """

    def fixed(items: Sequence[Item]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for places, tokens in batches([length(item) for item in items], longest, ROWS - 2):
            fillers = [filler(tokens), *[filler(SHORTEST)] * (ROWS - 1 - len(places))]
            found = forward([*(items[place] for place in places), *fillers])
            answers |= dict(zip(places, found, strict=False))
        return [answers[place] for place in range(len(items))]

    return fixed


def batches(lengths: Sequence[int], longest: int | None, most: int) -> Iterator[tuple[list[int], int]]:
    """Places of at most `most` items that share a padded length, and that length. It depends on each item alone."""
    by_length: dict[int, list[int]] = {}
    for place, tokens in enumerate(lengths):
        by_length.setdefault(rounded_up(tokens, longest), []).append(place)
    for padded, places in by_length.items():
        for start in range(0, len(places), most):
            yield places[start : start + most], padded


def rounded_up(tokens: int, longest: int | None) -> int:
    """To a multiple of LENGTH_STEP, or to the longest that there may be."""
    padded = -(-tokens // LENGTH_STEP) * LENGTH_STEP
    return padded if longest is None else max(min(padded, longest), tokens)


def check_alike(answers: Sequence[object], what: str) -> None:
    """
    Args:
        answers: to equal items in different places of one batch, in a form that == compares bit for bit.

    Raises:
        SettingsError: they are not equal, so the shape alone does not make answers repeatable here.
    """
    if any(answer != answers[0] for answer in answers):
        raise SettingsError(
            f"run.deterministic: on this machine {what} rounds a sequence differently in different places of a batch, "
            "so equal shapes do not make equal numbers; policy.max_sequences = 1 would"
        )
