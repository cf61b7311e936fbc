"""The words of the minimal pairs: plain, frequent ones, chosen so that any draw makes sense.

A noun is (singular, plural). No noun here starts with a vowel sound, so that "a" fits them all.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ADJECTIVES",
    "COMPARED",
    "FEMALES",
    "HABITS",
    "HAPPENED",
    "IRREGULAR",
    "MALES",
    "MASSES",
    "NAMES_FEMALE",
    "NAMES_MALE",
    "PEOPLE",
    "PLACES",
    "PRONOUNS",
    "REFLEXIVE",
    "RELATIONS",
    "STATES",
    "THINGS",
    "THING_STATES",
    "TIMES",
    "TRANSITIVE",
    "VANISHED",
    "Noun",
    "Verb",
]


class Noun(NamedTuple):
    sg: str
    pl: str


class Verb(NamedTuple):
    base: str
    past: str
    participle: str
    objects: tuple[str, ...] = ()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _nouns(words: str) -> tuple[Noun, ...]:
    pairs = (word.partition("/") for word in words.split())
    return tuple(Noun(sg, pl or sg + "s") for sg, _, pl in pairs)


MALES = _nouns("king boy man/men father brother husband son prince lord monk gentleman/gentlemen")
FEMALES = _nouns("queen girl woman/women mother sister wife/wives daughter princess/princesses nun")
PEOPLE = _nouns(
    "farmer teacher soldier doctor sailor writer boy girl man/men woman/women child/children "
    "friend servant priest captain judge stranger lady/ladies guard student baker painter "
    "hunter merchant shepherd"
)
NAMES_MALE = ("John", "Peter", "Thomas", "James", "William", "Robert", "George", "Henry")
NAMES_FEMALE = ("Mary", "Anna", "Jane", "Sarah", "Elizabeth", "Margaret", "Alice", "Helen")

THINGS = _nouns(
    "book letter table chair key box/boxes cup coat hat boat picture lamp knife/knives bottle "
    "basket clock bell candle mirror blanket wheel drum"
)
PLACES = _nouns("house tree wall bridge gate church/churches window door hill well tower garden")
MASSES = ("bread", "milk", "money", "water", "fruit", "gold", "wine", "corn", "salt", "wood", "wool")

ADJECTIVES = ("old", "young", "tall", "rich", "poor", "kind", "strong", "wise", "proud", "small")
STATES = ("tired", "happy", "kind", "rich", "poor", "wise", "busy", "afraid", "angry", "ill")
THING_STATES = ("old", "new", "black", "white", "broken", "small", "dirty", "heavy", "green", "lost")

# What people do by habit: the form of (one, several).
HABITS = tuple(
    Noun(base + "s", base)
    for base in _words("work sleep laugh sing wait walk dance smile read pray run dream")
)
TIMES = ("every day", "every morning", "in the garden", "in the evening", "all the time", "too much")

# (base, past, participle); these need one object and take no second one: without it the sentence is
# broken, and so it is with a question word before and the object in its place after.
TRANSITIVE = tuple(
    Verb(base, past, past)
    for base, past in (
        ("destroy", "destroyed"),
        ("mention", "mentioned"),
        ("receive", "received"),
        ("repair", "repaired"),
        ("obtain", "obtained"),
        ("remove", "removed"),
        ("damage", "damaged"),
        ("carry", "carried"),
        ("describe", "described"),
    )
)
# ... and these cannot have one.
VANISHED = _words(
    "arrived slept died vanished coughed appeared smiled waited sneezed disappeared remained departed"
)
HAPPENED = ("yesterday", "last night", "in the morning", "after dinner", "on Monday", "in the garden")

# Past and participle differ and dictionaries give only one of each, so a swap is an error.
IRREGULAR = (
    Verb("break", "broke", "broken", ("the cup", "the window", "the lamp", "the chair")),
    Verb("write", "wrote", "written", ("the letter", "the book", "the song")),
    Verb("take", "took", "taken", ("the key", "the money", "the boat")),
    Verb("eat", "ate", "eaten", ("the bread", "the fish", "the fruit")),
    Verb("steal", "stole", "stolen", ("the horse", "the ring", "the money")),
    Verb("wear", "wore", "worn", ("the coat", "the hat", "the ring")),
    Verb("tear", "tore", "torn", ("the letter", "the coat", "the paper")),
    Verb("throw", "threw", "thrown", ("the stone", "the ball", "the cup")),
    Verb("draw", "drew", "drawn", ("the picture", "the map", "the sword")),
    Verb("choose", "chose", "chosen", ("the house", "the book", "the horse")),
    Verb("drive", "drove", "driven", ("the sheep", "the cart", "the horses")),
    Verb("see", "saw", "seen", ("the ship", "the light", "the river")),
    Verb("grow", "grew", "grown", ("the corn", "the flowers", "the trees")),
    Verb("shake", "shook", "shaken", ("the tree", "the box", "the bottle")),
    Verb("freeze", "froze", "frozen", ("the fish", "the milk", "the fruit")),
)

# What people do to people: (singular, plural) present, then past.
RELATIONS = tuple(
    (Noun(base + "s", base), past)
    for base, past in (
        ("know", "knew"),
        ("love", "loved"),
        ("help", "helped"),
        ("follow", "followed"),
        ("thank", "thanked"),
        ("visit", "visited"),
        ("praise", "praised"),
        ("meet", "met"),
        ("trust", "trusted"),
        ("fear", "feared"),
    )
)

REFLEXIVE = (
    "saw {} in the mirror",
    "cut {} with a knife",
    "blamed {} for the loss",
    "hid {} behind the door",
    "asked {} a question",
    "bought {} some bread",
    "thought {} too slow",
    "taught {} to read",
    "warmed {} by the fire",
    "hurt {} in the garden",
    "laughed at {} last night",
    "spoke to {} in the dark",
    "threw {} into the river",
    "found {} alone in the house",
    "looked at {} for a long time",
)

PRONOUNS = (("I", "me"), ("he", "him"), ("she", "her"), ("we", "us"), ("they", "them"))

COMPARED = tuple(
    word.split("/")
    for word in _words(
        "old/older small/smaller large/larger tall/taller cheap/cheaper strong/stronger "
        "dark/darker clean/cleaner long/longer short/shorter wide/wider heavy/heavier big/bigger "
        "new/newer"
    )
)
