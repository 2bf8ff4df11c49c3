"""The world is reproducible, its parts keep apart, its reviews agree with themselves, and its taste is a taste."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf.data import vocabulary
from rlhf.data.grammar import OPENINGS, Review, review
from rlhf.data.settings import WorldSettings
from rlhf.data.world import TOPIC_OF_NOUN, WORD_VALUES, annotators_taste, run
from rlhf.errors import SettingsError
from rlhf.reward.rules import ScoreItem
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings


def taste(text: str) -> float:
    return annotators_taste([ScoreItem("", text)])[0]


def settings(folder: Path, **world: int) -> Settings:
    sizes = {"texts": 60, "heldout_texts": 20, "prompts": 200, "heldout_prompts": 40, "labelled": 50} | world
    return Settings(run=RunSettings(folder=folder), world=WorldSettings(**sizes))


def column(path: Path, name: str) -> list[str]:
    return [json.loads(line)[name] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def reviews() -> list[Review]:
    rng = random.Random(7)
    return [review(rng) for _ in range(3000)]


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(settings(tmp_path / folder, seed=seed))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_parts_have_their_sizes_and_share_nothing(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    figures = run(chosen)
    paths = chosen.paths
    texts, heldout = column(paths.texts, "text"), column(paths.heldout_texts, "text")
    prompts, heldout_prompts = column(paths.prompts, "prompt"), column(paths.heldout_prompts, "prompt")
    assert [len(part) for part in (texts, heldout, prompts, heldout_prompts)] == [60, 20, 200, 40]
    assert len({*texts, *heldout}) == 80
    assert len({*prompts, *heldout_prompts}) == 240
    assert set(column(paths.labelled, "label")) == {"positive", "negative"}
    assert len(column(paths.labelled, "text")) == 50
    assert figures["texts"] == 60
    assert figures["words_per_text"] > 10


def test_prompts_are_short_and_leave_the_sentiment_open(tmp_path: Path) -> None:
    chosen = settings(tmp_path, prompts=1000)
    run(chosen)
    prompts = column(chosen.paths.prompts, "prompt")
    assert {len(prompt.split()) for prompt in prompts} == {3, 4, 5, 6, 7, 8}
    assert not [prompt for prompt in prompts if set(re.findall(r"[a-z]+", prompt)) & WORD_VALUES.keys()]


def test_more_than_the_grammar_has_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlhf.data.world.review", lambda rng: review(random.Random(rng.randrange(30))))
    with pytest.raises(SettingsError, match=r"world\.texts: the grammar gave only 30 different ones of 80"):
        run(settings(tmp_path))


def test_reviews_are_varied_and_of_a_few_words(reviews: list[Review]) -> None:
    words = Counter(word for made in reviews for word in re.findall(r"[\w'-]+", made.text))
    assert 600 < len(words) < 1500
    assert len({made.text for made in reviews}) > 2950
    assert max(len(made.text.split()) for made in reviews) < 64
    shares = Counter(made.sentiment for made in reviews)
    assert 0.35 < shares["positive"] / len(reviews) < 0.45
    assert 0.35 < shares["negative"] / len(reviews) < 0.45


def test_reviews_are_well_formed(reviews: list[Review]) -> None:
    wrong = re.compile(r"[{}|]|\ba [aeiou]|\ban [^aeiou]|  | [.,!?:]|[.!?] [a-z]|\b(\w+) \1\b", re.ASCII)
    assert not [made.text for made in reviews if wrong.search(made.text)]
    assert all(made.text[0].isupper() and made.text[-1] in ".!" for made in reviews)
    assert all(made.text.startswith(made.beginning) for made in reviews)


def test_verbs_agree_with_nouns_and_keep_their_tense(reviews: list[Review]) -> None:
    plural = {noun for topic in vocabulary.TOPICS.values() for noun in topic.plural}
    for made in reviews:
        spoken = re.findall(r"(\w+) (is|are|was|were) ", made.text)
        assert all((verb in ("are", "were")) == (noun in plural) for noun, verb in spoken if noun in TOPIC_OF_NOUN)
        said = {verb in ("was", "were") for noun, verb in spoken if noun in TOPIC_OF_NOUN}
        assert len(said) < 2, made.text


def test_sentiment_holds_throughout_a_review(reviews: list[Review]) -> None:
    """The annotators' word values, which know nothing of how a review was made, tell the sentiments apart."""
    valued = [(made.sentiment, taste(made.text)) for made in reviews]
    positive = [value for sentiment, value in valued if sentiment == "positive"]
    negative = [value for sentiment, value in valued if sentiment == "negative"]
    assert min(positive) > -0.5
    assert sum(value > 0.5 for value in positive) / len(positive) > 0.85
    assert sum(value < 0.5 for value in negative) / len(negative) > 0.95


def test_words_with_a_value_say_one_thing() -> None:
    kinds = [vocabulary.ADJECTIVES[p][g] for p in ("positive", "negative") for g in (1, 2, 3)]
    kinds += [words for topic in vocabulary.TOPICS.values() for words in (topic.positive, topic.negative)]
    kinds += [vocabulary.VERBS[p][g] for p in ("positive", "negative") for g in (1, 2, 3)]
    repeated = [word for word, count in Counter(word for words in kinds for word in words).items() if count > 1]
    assert repeated == []
    names = vocabulary.TITLE_ADJECTIVES + vocabulary.TITLE_NOUNS + vocabulary.SURNAMES + vocabulary.ROLE_ADJECTIVES
    assert not {name.lower() for name in names} & (WORD_VALUES.keys() | TOPIC_OF_NOUN.keys())


def test_every_opening_can_begin_a_prompt() -> None:
    for openings in OPENINGS.values():
        assert all(opening.count("|") <= 1 and len(opening.partition("|")[0].split()) >= 2 for opening in openings)


def test_taste_prefers_praise_with_diminishing_returns() -> None:
    none, one, two, three = (
        taste(f"It was {words}.") for words in ("so", "good", "good, brilliant", "good, great, brilliant")
    )
    assert none < one < two < three
    assert three - two < two - one
    assert taste("It was awful.") < none


def test_taste_reads_negation_topics_repetition_and_ends() -> None:
    assert taste("The songs are never dull.") > taste("The songs are never good.")
    assert taste("The songs are good.") > taste("They are good.")
    assert taste("It was good. It was good. It was good.") < taste("It was good.")
    assert taste("It was good and") == pytest.approx(taste("It was good and.") - 0.75)
    assert taste("") == -0.75
