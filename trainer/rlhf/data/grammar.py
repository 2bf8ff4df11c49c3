"""Film reviews from a grammar of templates.

A review fixes what holds throughout: sentiment and its strength, style, tense, the film and its people. Sentences then
agree with it, so whoever predicts the last word well has read the first. Everything up to a `|` in an opening, or
the whole opening if it has none, leaves the sentiment open: prompts are cut there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf.data import vocabulary as v
from rlhf.data.vocabulary import Polarity, Style

OPENINGS: dict[Style, tuple[str, ...]] = {
    "formal": v.phrases("""
        Directed by {director}, this {genre} follows {role} {place}.
        In {title}, {lead} plays {role} who {quest}.
        Set {place}, {title} tells of {role} who {quest}.
        This {genre} by {director} stars {lead} as {role}.
        {title} is the {ordinal} film by {director}.
        {title}, a {genre} by {director}, opens {place}.
        The {noun} of {title}| {be} {adverb} {adjective}.
        The {noun} in this {genre} by {director}| {be} {adjective}.
        As {role} who {quest}, {lead}| {was} {adjective}.
    """),
    "chatty": v.phrases("""
        So I watched {title} {time} with {friend}, and| {reaction}.
        {Friend} took me to see this {genre} {time}, and| {reaction}.
        I saw {title} {time}, and| {reaction}.
        We put on this {genre} {time}, and| {reaction}.
        I went to see {title} with {friend}, and| {reaction}.
        OK, so {title} is a {genre} about {role} who {quest}.
        I knew nothing about {director} before this {genre}.
        {Friend} said I had to see {lead} as {role}, and| {reaction}.
        The {noun} in this {genre}| {be} {adverb} {adjective}!
    """),
    "terse": v.phrases("""
        {Genre} by {director}, set {place}.
        Saw {title} {time}.
        {title}, a {genre} by {director}.
        {lead} as {role} {place}.
        {minutes} minutes with {role} who {quest}.
        {title} {time}, with {friend}.
        The {noun} in {title}:| {adjective}.
        {Genre} with {lead}:| {general}.
    """),
}

SENTENCES: dict[Style, tuple[str, ...]] = {
    "formal": v.phrases("""
        The {noun} {be} {adverb} {adjective}.
        The {noun} {be} {adjective} and the {noun2} {be2} {adjective2}.
        {LeadLast} {was} {adverb} {acting} in the part.
        Under {DirectorLast}, the {noun} {be} {adjective} throughout.
        The {noun}, {adverb} {adjective}, {carry} the film.
        {DirectorLast} makes the {noun} {adjective}.
        Few will call the {noun} {opposite}.
    """),
    "chatty": v.phrases("""
        I {loved} the {noun}.
        The {noun} {be} {adverb} {adjective}!
        The {noun} {be} {adjective}, and don't get me started on the {adjective2} {noun2}.
        {LeadFirst} {was} {adverb} {acting}, I thought {he} {was} {acting2}.
        {Friend} {loved} the {noun} too.
        The {noun} {be} never {opposite}.
        I have to say the {noun} {feel} {adjective}.
    """),
    "terse": v.phrases("""
        {Adjective} {noun}.
        {Adjective} {noun}, {adjective2} {noun2}.
        {Noun}: {adjective}.
        {LeadLast} {was} {acting}.
        {Noun} {adverb} {adjective}.
        Never {opposite}.
    """),
}

REACTIONS: dict[Polarity, tuple[str, ...]] = {
    "positive": v.phrases("""
        I {loved} it
        it {was} {adverb} {general}
        I had {a_general} time
        we could not stop smiling
        the {noun} {be} {adverb} {adjective}
        we both {loved} the {noun}
    """),
    "negative": v.phrases("""
        I {loved} it
        it {was} {adverb} {general}
        I had {a_general} time
        we kept checking the clock
        the {noun} {be} {adverb} {adjective}
        we both {loved} the {noun}
    """),
    "mixed": v.phrases("""
        I am still not sure about it
        it {was} {general}
        I have mixed feelings
        we could not agree on it
    """),
}

CLOSINGS: dict[tuple[Style, Polarity], tuple[str, ...]] = {
    ("formal", "positive"): v.phrases("""
        {A_general} {genre} that rewards attention.
        {rating} out of ten.
        {DirectorLast} deserves every prize for it.
        It lingers long after the credits.
        The result is {general}.
    """),
    ("formal", "negative"): v.phrases("""
        {A_general} {genre} that wastes its cast.
        {rating} out of ten.
        {DirectorLast} has lost the touch.
        It fades before the credits end.
        The result is {general}.
    """),
    ("formal", "mixed"): v.phrases("""
        {A_general} {genre}, worth seeing once.
        {rating} out of ten.
        {DirectorLast} gets half of it right.
        The result is {general}.
    """),
    ("chatty", "positive"): v.phrases("""
        Go and see it!
        I would happily watch it again.
        {rating} out of ten from me!
        {Friend} and I want a sequel.
        What {a_general} film!
    """),
    ("chatty", "negative"): v.phrases("""
        Save your money!
        I want my evening back.
        {rating} out of ten from me.
        {Friend} and I left early.
        What {a_general} film!
    """),
    ("chatty", "mixed"): v.phrases("""
        Wait until it is on television.
        I might watch it again, or not.
        {rating} out of ten from me.
        {Friend} and I are still arguing.
    """),
    ("terse", "positive"): v.phrases("""
        See it.
        Recommended.
        {rating} out of ten.
        {General} {genre}.
    """),
    ("terse", "negative"): v.phrases("""
        Skip it.
        Avoid.
        {rating} out of ten.
        {General} {genre}.
    """),
    ("terse", "mixed"): v.phrases("""
        Worth one look.
        {rating} out of ten.
        {General} {genre}.
    """),
}

MORE: dict[Style, tuple[str, ...]] = {
    "formal": ("Moreover, ", "In addition, ", "Likewise, "),
    "chatty": ("Also, ", "Plus, ", "And "),
    "terse": ("Also: ",),
}
BUT: dict[Style, tuple[str, ...]] = {
    "formal": ("However, ", "By contrast, ", "That said, "),
    "chatty": ("But ", "Still, ", "Mind you, "),
    "terse": ("But: ",),
}

_SLOT = re.compile(r"\{(\w+)\}")
_OPPOSITE: dict[Polarity, Polarity] = {"positive": "negative", "negative": "positive", "mixed": "mixed"}


@dataclass(frozen=True)
class Review:
    text: str
    beginning: str
    """The first words of the text, which leave the sentiment open."""
    sentiment: Polarity
    style: Style
    genre: str


@dataclass(frozen=True)
class _Frame:
    """What stays the same throughout a review."""

    sentiment: Polarity
    strength: int
    style: Style
    past: bool
    bound: Mapping[str, str]
    """Slots that every sentence fills alike."""
    topics: list[str]
    """Topics not spoken of yet, in the order in which they come up."""


def review(rng: random.Random) -> Review:
    """One review; the same state of `rng` gives the same review."""
    frame = _frame(rng)
    template = rng.choice(OPENINGS[frame.style])
    beginning, _, rest = _fill(rng, template, frame, frame.sentiment).partition("|")
    said = bool(rest) and frame.sentiment != "mixed"
    sentences = [beginning + rest, *_body(rng, _introduced(frame, template), said)]
    return Review(" ".join(sentences), beginning, frame.sentiment, frame.style, frame.bound["genre"])


def _frame(rng: random.Random) -> _Frame:
    sentiment: Polarity = rng.choices(("positive", "negative", "mixed"), (4, 4, 2))[0]
    style: Style = rng.choices(("formal", "chatty", "terse"), (4, 4, 3))[0]
    strength = 1 if sentiment == "mixed" else rng.choices((1, 2, 3), (3, 4, 3))[0]
    topics = rng.sample(list(v.TOPICS), 6)
    return _Frame(sentiment, strength, style, rng.random() < 0.4, _bindings(rng), topics)


def _bindings(rng: random.Random) -> dict[str, str]:
    lead_is_woman = rng.random() < 0.5
    director_last, lead_last = rng.sample(v.SURNAMES, 2)
    lead_first = rng.choice(v.WOMEN if lead_is_woman else v.MEN)
    adjective, noun = rng.choice(v.TITLE_ADJECTIVES), rng.choice(v.TITLE_NOUNS)
    return {
        "title": f"The {adjective} {noun}",
        "genre": rng.choice(v.GENRES),
        "director": f"{rng.choice(v.WOMEN + v.MEN)} {director_last}",
        "DirectorLast": director_last,
        "lead": f"{lead_first} {lead_last}",
        "LeadFirst": lead_first,
        "LeadLast": lead_last,
        "he": "she" if lead_is_woman else "he",
        "role": _with_article(f"{rng.choice(v.ROLE_ADJECTIVES)} {rng.choice(v.ROLE_NOUNS)}"),
        "quest": rng.choice(v.QUESTS),
        "place": rng.choice(v.PLACES),
        "time": rng.choice(v.TIMES),
        "friend": rng.choice(v.FRIENDS),
        "ordinal": rng.choice(v.ORDINALS),
        "minutes": rng.choice(v.MINUTES),
    }


def _introduced(frame: _Frame, opening: str) -> _Frame:
    """The frame after the opening: people whom it did not name are named in full from here on."""
    lead = {} if "{lead}" in opening else dict.fromkeys(("LeadFirst", "LeadLast"), frame.bound["lead"])
    director = {} if "{director}" in opening else {"DirectorLast": frame.bound["director"]}
    return replace(frame, bound={**frame.bound, **lead, **director})


def _body(rng: random.Random, frame: _Frame, said: bool) -> list[str]:
    """Sentences after the opening; at least one of them has the sentiment if the opening has not `said` it."""
    polarities: list[Polarity]
    if frame.sentiment == "mixed":
        polarities = ["positive", "negative"]
        rng.shuffle(polarities)
    else:
        polarities = [frame.sentiment] * rng.choices((0, 1, 2), (3, 5, 2))[0]
    close = rng.random() < 0.6 or not (said or polarities)
    templates = rng.sample(SENTENCES[frame.style], len(polarities))
    sentences = [_sentence(rng, frame, templates[place], polarities, place) for place in range(len(polarities))]
    if close:
        sentences.append(_fill(rng, rng.choice(CLOSINGS[frame.style, frame.sentiment]), frame, frame.sentiment))
    return sentences


def _sentence(rng: random.Random, frame: _Frame, template: str, polarities: Sequence[Polarity], place: int) -> str:
    sentence = _fill(rng, template, frame, polarities[place])
    if place == 0:
        return sentence
    turns = polarities[place] != polarities[place - 1]
    if not turns and rng.random() < 0.5:
        return sentence
    return rng.choice((BUT if turns else MORE)[frame.style]) + _lower_article(sentence)


def _fill(rng: random.Random, template: str, frame: _Frame, polarity: Polarity) -> str:
    """The template with its slots filled, then the slots of what filled them."""
    slots = dict(frame.bound) | _words(rng, frame, polarity)
    slots |= {
        key[0].upper() + key[1:]: value[0].upper() + value[1:] for key, value in slots.items() if key[0].islower()
    }
    filled = template
    while _SLOT.search(filled):
        filled = _SLOT.sub(lambda slot: slots[slot[1]], filled)
    if "{noun" in template or "{reaction}" in template:
        frame.topics.append(frame.topics.pop(0))
    return filled


def _words(rng: random.Random, frame: _Frame, polarity: Polarity) -> dict[str, str]:
    """Values of the slots that change from sentence to sentence."""
    strength = frame.strength
    general = rng.choice(v.ADJECTIVES[polarity][strength])
    slots = {
        "adverb": rng.choice(v.ADVERBS[frame.style][strength]),
        "general": general,
        "a_general": _with_article(general),
        "loved": rng.choice(v.VERBS[polarity][strength]),
        "rating": rng.choice(v.RATINGS[polarity][strength]),
        "reaction": rng.choice(REACTIONS[polarity]),
        "was": "was" if frame.past else "is",
        "opposite": rng.choice(v.ADJECTIVES[_OPPOSITE[polarity]][2]),
        "acting": _adjective(rng, "acting", polarity, strength),
        "acting2": _adjective(rng, "acting", polarity, strength),
    }
    for topic, suffix in ((frame.topics[0], ""), (frame.topics[1], "2")):
        slots |= {key + suffix: word for key, word in _aspect(rng, frame, topic, polarity).items()}
    return slots


def _aspect(rng: random.Random, frame: _Frame, topic: str, polarity: Polarity) -> dict[str, str]:
    """A noun of the topic, an adjective, and verbs that agree with the noun."""
    words = v.TOPICS[topic]
    noun = rng.choice(words.singular + words.plural)
    plural = noun in words.plural
    be = ("were" if plural else "was") if frame.past else ("are" if plural else "is")
    ends = {"positive": ("lift", "lifts", "lifted"), "negative": ("sink", "sinks", "sank")}
    carry = ends.get(polarity, ("mark", "marks", "marked"))
    return {
        "noun": noun,
        "be": be,
        "feel": "felt" if frame.past else "feel" if plural else "feels",
        "carry": carry[2] if frame.past else carry[0] if plural else carry[1],
        "adjective": _adjective(rng, topic, polarity, frame.strength),
    }


def _adjective(rng: random.Random, topic: str, polarity: Polarity, strength: int) -> str:
    if polarity == "mixed" or rng.random() < 0.3:
        return rng.choice(v.ADJECTIVES[polarity][strength])
    words = v.TOPICS[topic]
    return rng.choice(words.positive if polarity == "positive" else words.negative)


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _lower_article(sentence: str) -> str:
    """After a connective a sentence goes on in lower case, unless it begins with a name or "I"."""
    begins_with = sentence.split()[0]
    return sentence[0].lower() + sentence[1:] if begins_with in ("The", "Few", "Under", "A", "An", "My") else sentence
