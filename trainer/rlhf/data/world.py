"""The synthetic world of the demo: film reviews to learn from, their beginnings as prompts, and what annotators like.

It needs no download, and everything in it follows from one seed. The annotators' taste reads word values from the
vocabulary; the judge of `rlhf.evaluate` is fitted from labelled reviews and shares neither code nor features with it.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from rlhf.data import vocabulary
from rlhf.data.grammar import Review, review
from rlhf.data.rows import write_rows
from rlhf.data.settings import WorldSettings
from rlhf.errors import SettingsError
from rlhf.settings.run import Settings

if TYPE_CHECKING:
    from rlhf.reward.rules import ScoreItem

_PROMPT_WORDS = (3, 8)
_WORD = re.compile(r"[\w'-]+")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+")

_log = logging.getLogger(__name__)


def run(settings: Settings) -> Mapping[str, Any]:
    """`rlhf world`: writes texts and prompts, some of each held out, and labelled reviews; returns their numbers."""
    world, paths = settings.world, settings.paths
    texts = _distinct(world, "texts", world.texts + world.heldout_texts, lambda rng: {"text": review(rng).text})
    prompts = _distinct(world, "prompts", world.prompts + world.heldout_prompts, _prompt)
    labelled = _distinct(world, "labelled", world.labelled, _labelled)
    write_rows(paths.texts, texts[: world.texts])
    write_rows(paths.heldout_texts, texts[world.texts :])
    write_rows(paths.prompts, prompts[: world.prompts])
    write_rows(paths.heldout_prompts, prompts[world.prompts :])
    write_rows(paths.labelled, labelled)
    _log.info("wrote the world's texts and prompts to %s", paths.texts.parent)
    return world.model_dump() | _measures([row["text"] for row in texts])


def annotators_taste(items: Sequence[ScoreItem]) -> list[float]:
    """What simulated annotators like in a completion, one number each; a rule as `rlhf.reward.rules` describes them.

    Praise, with diminishing returns (at most ±3); naming what is praised; no repetition; a finished last sentence.
    """
    return [_taste(item.completion) for item in items]


def _taste(text: str) -> float:
    words = _WORD.findall(text.lower())
    praise = sum(_praise(sentence) for sentence in _SENTENCE_END.split(text.lower()))
    topics = {TOPIC_OF_NOUN[word] for word in words if word in TOPIC_OF_NOUN}
    finished = text.rstrip().endswith((".", "!", "?"))
    return (
        3.0 * math.tanh(praise / 5.0)
        + 0.3 * min(len(topics), 2)
        - 4.0 * _repeated_share(words)
        - (0.0 if finished else 0.75)
    )


def _praise(sentence: str) -> float:
    """Sum of the word values; "never", "not" and "few" turn what follows them."""
    total, sign = 0.0, 1.0
    for word in _WORD.findall(sentence):
        sign = -1.0 if word in ("never", "not", "few") else sign
        total += sign * WORD_VALUES.get(word, 0.0)
    return total


def _repeated_share(words: Sequence[str]) -> float:
    """Share of the word pairs that have been there before."""
    pairs = list(pairwise(words))
    return 1.0 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _word_values() -> dict[str, float]:
    """Word to value, -3 to 3: the strength of graded words, 2 for what is said of a topic."""
    values = {"recommended": 2.0, "skip": -2.0, "avoid": -2.0}
    for graded in (vocabulary.ADJECTIVES, vocabulary.VERBS):
        values |= {word: float(grade) for grade, words in graded["positive"].items() for word in words}
        values |= {word: -float(grade) for grade, words in graded["negative"].items() for word in words}
    for topic in vocabulary.TOPICS.values():
        values |= dict.fromkeys(topic.positive, 2.0) | dict.fromkeys(topic.negative, -2.0)
    return values


WORD_VALUES = _word_values()
TOPIC_OF_NOUN = {noun: name for name, topic in vocabulary.TOPICS.items() for noun in topic.singular + topic.plural}


def _distinct(
    world: WorldSettings, part: str, count: int, make: Callable[[random.Random], dict[str, str] | None]
) -> list[dict[str, str]]:
    """`count` rows of which no two have the same text or prompt; each part of the world has a stream of its own.

    Raises:
        SettingsError: the grammar does not have that many.
    """
    rng = random.Random(f"{world.seed}/{part}")
    rows: dict[str, dict[str, str]] = {}
    for row in islice(_made(rng, make), 20 * count + 1000):
        rows.setdefault(row.get("prompt") or row["text"], row)
        if len(rows) == count:
            return list(rows.values())
    raise SettingsError(f"world.{part}: the grammar gave only {len(rows)} different ones of {count}; ask for fewer")


def _made(rng: random.Random, make: Callable[[random.Random], dict[str, str] | None]) -> Iterator[dict[str, str]]:
    while True:
        row = make(rng)
        if row is not None:
            yield row


def _prompt(rng: random.Random) -> dict[str, str] | None:
    """The first words of a review, as long as they leave the sentiment open; None where those are too few."""
    made: Review = review(rng)
    words = made.beginning.split()
    shortest, longest = _PROMPT_WORDS
    if len(words) < shortest:
        return None
    length = rng.randint(shortest, min(longest, len(words)))
    return {"prompt": " ".join(words[:length]), "genre": made.genre, "style": made.style}


def _labelled(rng: random.Random) -> dict[str, str] | None:
    made = review(rng)
    return None if made.sentiment == "mixed" else {"text": made.text, "label": made.sentiment}


def _measures(texts: Sequence[str]) -> dict[str, float]:
    words = [word for text in texts for word in _WORD.findall(text)]
    return {"word_types": len(set(words)), "words_per_text": len(words) / len(texts)}
