"""Words of the synthetic world: what its film reviews are made of. Data only; `rlhf.data.grammar` puts it together.

Spelling is British. Words with a value stand in exactly one grade of one polarity, so that a word says what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Polarity = Literal["positive", "negative", "mixed"]
Style = Literal["terse", "chatty", "formal"]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


@dataclass(frozen=True)
class Topic:
    """An aspect of a film, its names, and what is said of it."""

    singular: tuple[str, ...]
    plural: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]


TOPICS = {
    "plot": Topic(
        words("plot story narrative"),
        (),
        words("gripping clever taut inventive surprising absorbing intricate"),
        words("thin muddled predictable contrived confusing implausible"),
    ),
    "acting": Topic(
        words("acting cast"),
        words("performances"),
        words("superb natural convincing moving nuanced heartfelt"),
        words("wooden stiff unconvincing lifeless hammy strained"),
    ),
    "music": Topic(
        words("music score soundtrack"),
        words("songs"),
        words("haunting lovely memorable stirring tender melodic"),
        words("grating forgettable shrill overbearing syrupy intrusive"),
    ),
    "camera": Topic(
        words("camerawork photography cinematography"),
        words("images"),
        words("gorgeous elegant luminous crisp striking painterly"),
        words("shaky murky ugly drab careless blurry"),
    ),
    "pace": Topic(
        words("pace rhythm pacing"),
        (),
        words("brisk steady assured lively nimble"),
        words("sluggish uneven slow hurried plodding jerky"),
    ),
    "ending": Topic(
        words("ending finale climax"),
        (),
        words("satisfying touching perfect bold unforgettable uplifting"),
        words("abrupt silly hollow rushed baffling unsatisfying"),
    ),
    "dialogue": Topic(
        words("dialogue script writing"),
        words("lines"),
        words("sharp witty smart quotable playful eloquent"),
        words("clumsy stilted clunky trite corny laboured"),
    ),
    "characters": Topic(
        words("villain hero"),
        words("characters"),
        words("believable vivid lovable complex charming warm"),
        words("shallow flat irritating unlikable bland cartoonish"),
    ),
    "costumes": Topic(
        words("wardrobe makeup"),
        words("costumes sets"),
        words("lavish beautiful detailed stylish sumptuous imaginative"),
        words("cheap shabby garish tacky sloppy threadbare"),
    ),
    "action": Topic(
        words("action spectacle"),
        words("effects stunts chases"),
        words("spectacular seamless thrilling dazzling exciting polished"),
        words("fake dated messy noisy weightless crude"),
    ),
    "humour": Topic(
        words("humour wit"),
        words("jokes gags"),
        words("hilarious funny sly delightful infectious irresistible"),
        words("unfunny lame crass stale forced childish"),
    ),
    "direction": Topic(
        words("direction staging editing"),
        (),
        words("confident subtle precise graceful skilful fluent"),
        words("chaotic aimless timid choppy lazy amateurish"),
    ),
    "mood": Topic(
        words("mood atmosphere tone"),
        (),
        words("enchanting hypnotic immersive magical intimate"),
        words("dreary stuffy oppressive joyless monotonous"),
    ),
    "setting": Topic(
        words("scenery setting"),
        words("landscapes locations"),
        words("breathtaking evocative picturesque stunning majestic"),
        words("empty artificial unremarkable colourless"),
    ),
    "meaning": Topic(
        words("message premise"),
        words("themes ideas"),
        words("thoughtful profound honest timely wise"),
        words("preachy banal obvious simplistic pretentious"),
    ),
}

# Adjectives for anything, by strength 1 (mild) to 3 (strong).
ADJECTIVES: dict[Polarity, dict[int, tuple[str, ...]]] = {
    "positive": {
        1: words("decent pleasant solid likeable agreeable"),
        2: words("good great enjoyable impressive engaging strong"),
        3: words("brilliant wonderful outstanding magnificent masterful flawless"),
    },
    "negative": {
        1: words("weak patchy underwhelming lacklustre disappointing"),
        2: words("bad poor boring dull tedious tiresome"),
        3: words("awful terrible dreadful atrocious unbearable horrible"),
    },
    "mixed": dict.fromkeys((1, 2, 3), words("average passable watchable ordinary middling tolerable")),
}

ADVERBS: dict[Style, dict[int, tuple[str, ...]]] = {
    "terse": {1: words("fairly mostly"), 2: words("very"), 3: words("utterly simply")},
    "chatty": {1: words("quite pretty"), 2: words("really so"), 3: words("absolutely totally incredibly")},
    "formal": {1: words("rather somewhat"), 2: words("consistently notably"), 3: words("truly thoroughly remarkably")},
}

VERBS: dict[Polarity, dict[int, tuple[str, ...]]] = {
    "positive": {1: words("liked appreciated"), 2: words("enjoyed admired"), 3: words("loved adored")},
    "negative": {1: words("disliked questioned"), 2: words("resented regretted"), 3: words("hated loathed")},
    "mixed": dict.fromkeys((1, 2, 3), words("noticed followed")),
}

RATINGS: dict[Polarity, dict[int, tuple[str, ...]]] = {
    "positive": {1: words("Seven"), 2: words("Eight"), 3: words("Nine Ten")},
    "negative": {1: words("Four"), 2: words("Three"), 3: words("Two One")},
    "mixed": dict.fromkeys((1, 2, 3), words("Five Six")),
}

GENRES = words("thriller comedy drama western romance musical documentary mystery biopic satire fantasy melodrama")

WOMEN = words("Mara Helena Ines Clara Ruth Nadia Yuki Alma Greta Leila Rosa Edith Vera Amina Judith Carmen")
MEN = words("Viktor Samuel Omar Jonas Pavel Hugo Kenji Arthur Luis Felix Ivan Marco Tobias Rashid Oscar Walter")
SURNAMES = words(
    "Voss Lindqvist Moreau Tanaka Okafor Bergman Castillo Novak Harrow Petrov Silva Whitfield Adeyemi Keller Rossi "
    "Dunne Marlowe Sato Ferreira Holm Baptiste Quinn Abbott Varga Lang Mendoza Fitzroy Grant Osei Winters"
)

TITLE_ADJECTIVES = words(
    "Silent Broken Golden Hidden Distant Crimson Frozen Marble Second Paper Northern Burning Quiet Stolen Velvet "
    "Winter Electric Forgotten Crooked Midnight Endless Glass Salt Wandering"
)
TITLE_NOUNS = words(
    "Harbour River Garden Letter Mountain Orchard Mirror Station Island Promise Shadow Kingdom Summer Bridge Lantern "
    "Voyage Lighthouse Carnival Window Inheritance Horizon Piano Stranger Valley"
)

ROLE_ADJECTIVES = words("retired young lonely stubborn restless penniless ambitious homesick curious reluctant")
ROLE_NOUNS = words(
    "detective nurse teacher boxer sailor pianist lawyer farmer thief pilot journalist cook soldier magician doctor "
    "gardener clerk dancer"
)
QUESTS = phrases("""
    searches for a lost brother
    inherits a lighthouse
    returns to the village of childhood summers
    plans to rob a bank
    falls for a stranger
    hides from an old friend
    crosses the desert on foot
    learns to fly
    solves a murder on a train
    opens a restaurant
    keeps a family secret
    answers letters meant for someone else
    takes in a runaway
    wakes up without a memory
    bets everything on one race
    raises three children alone
    moves into a house by the sea
    uncovers a scheme against the king
""")
PLACES = phrases("""
    in Lisbon
    in a small harbour town
    on a remote island
    in the mountains
    in postwar Vienna
    aboard a night train
    in a hotel in winter
    on the coast of Norway
    in a village school
    in the suburbs of Tokyo
    at the edge of the desert
    in a travelling circus
    in Buenos Aires
    on a cargo ship
    in nineteenth century London
    in a prison
    at a boarding school
    on the moon
""")
TIMES = phrases("""
    last night
    on Friday
    on Tuesday
    over the weekend
    yesterday
    on a rainy Sunday
    last week
    at a festival
    on a long flight
    at the local cinema
    on my birthday
    this morning
""")
FRIENDS = phrases("""
    my sister
    my brother
    a friend
    my flatmate
    my neighbour
    my cousin
    my father
    two colleagues
    my book club
    my daughter
""")
ORDINALS = words("first second third fourth latest")
MINUTES = phrases("""
    Ninety
    Eighty
    A hundred
    Seventy
    A hundred and twenty
""")
