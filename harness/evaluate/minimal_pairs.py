"""Minimal pairs of English sentences: one is grammatical, the other differs from it in one point.

The project's own templates and words, drawn by a seed, so the pairs need no download and no licence. The
idea of scoring a language model by which sentence of a pair it finds likelier is that of Linzen, Dupoux
and Goldberg (2016) and of BLiMP (Warstadt et al. 2020, arXiv:1912.00582); no sentence comes from there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from harness.errors import ConfigError
from harness.evaluate import pair_words as words
from harness.evaluate.pair_words import Noun

__all__ = ["PHENOMENA", "MinimalPair", "minimal_pairs"]

T = TypeVar("T")
Draw = tuple[str, str]  # the sentence, and the same with the error


@dataclass(frozen=True, slots=True)
class MinimalPair:
    """A grammatical sentence and its ungrammatical twin."""

    phenomenon: str
    good: str
    bad: str


class Dice:
    """Draws that stay the same on every Python: only `random()` is promised to."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random.random() * len(options))]

    def flip(self) -> bool:
        return self._random.random() < 0.5

    def order(self, first: T, second: T, swap: bool) -> tuple[T, T]:
        return (second, first) if swap else (first, second)

    def agreeing(self, noun: Noun, verb: Noun) -> tuple[str, str, str]:
        """A noun in one number, the verb that agrees with it, and the one that does not."""
        if self.flip():
            return noun.pl, verb.pl, verb.sg
        return noun.sg, verb.sg, verb.pl

    def other(self, options: Sequence[T], than: T) -> T:
        return self.pick([option for option in options if option != than])


BE = (Noun("is", "are"), Noun("was", "were"))


def minimal_pairs(per_phenomenon: int = 100, seed: int = 0) -> list[MinimalPair]:
    """`per_phenomenon` pairs of each of `PHENOMENA`, the phenomena taking turns.

    So the first n pairs hold about as many of each. No sentence occurs twice.

    Raises:
        ConfigError: the templates do not give so many.
    """
    seen: set[str] = set()
    columns = [_draw(name, per_phenomenon, seed, seen) for name in PHENOMENA]
    return [pair for row in zip(*columns, strict=True) for pair in row]


def _draw(phenomenon: str, count: int, seed: int, seen: set[str]) -> list[MinimalPair]:
    dice = Dice(f"{seed}/{phenomenon}")
    template = PHENOMENA[phenomenon]
    pairs: list[MinimalPair] = []
    for _ in range(20 * count):
        good, bad = (_sentence(text) for text in template(dice))
        if good not in seen and bad not in seen:
            seen |= {good, bad}
            pairs.append(MinimalPair(phenomenon, good, bad))
        if len(pairs) == count:
            return pairs
    raise ConfigError(f"the templates of {phenomenon} give only {len(pairs)} pairs, not {count}")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# --- agreement of subject and verb -------------------------------------------------------------------


def agreement_simple(dice: Dice) -> Draw:
    """The farmer works every day. / *The farmer work every day."""
    noun = dice.pick(words.PEOPLE)
    if dice.flip():
        subject, right, wrong = dice.agreeing(noun, dice.pick(words.HABITS))
        rest = dice.pick(words.TIMES)
    else:
        subject, right, wrong = dice.agreeing(noun, dice.pick(BE))
        rest = dice.pick(words.STATES)
    return f"the {subject} {right} {rest}", f"the {subject} {wrong} {rest}"


def agreement_prepositional(dice: Dice) -> Draw:
    """The key near the windows is old. / *The key near the windows are old."""
    nouns, states = dice.pick(((words.PEOPLE, words.STATES), (words.THINGS, words.THING_STATES)))
    head, right, wrong = dice.agreeing(noun := dice.pick(nouns), dice.pick(BE))
    place = dice.pick(words.PLACES)
    between = place.sg if head == noun.pl else place.pl
    start = f"the {head} {dice.pick(('near', 'behind', 'beside'))} the {between}"
    state = dice.pick(states)
    return f"{start} {right} {state}", f"{start} {wrong} {state}"


def agreement_relative(dice: Dice) -> Draw:
    """The man who knows the boys is happy. / *The man who knows the boys are happy."""
    noun = dice.pick(words.PEOPLE)
    head, right, wrong = dice.agreeing(noun, dice.pick(BE))
    plural = head == noun.pl
    other = dice.other(words.PEOPLE, noun)
    between = other.sg if plural else other.pl
    relation, _ = dice.pick(words.RELATIONS)
    if dice.flip():
        clause = f"who {relation.pl if plural else relation.sg} the {between}"
    else:
        clause = f"that the {between} {relation.sg if plural else relation.pl}"
    state = dice.pick(words.STATES)
    return f"the {head} {clause} {right} {state}", f"the {head} {clause} {wrong} {state}"


def existential(dice: Dice) -> Draw:
    """There is a book near the gate. / *There are a book near the gate."""
    noun, verb = dice.pick((*words.THINGS, *words.PEOPLE)), dice.pick(BE)
    what, right, wrong = dice.agreeing(noun, verb)
    number = dice.pick(("two", "three", "four", "many")) if what == noun.pl else "a"
    rest = f"{number} {what} {dice.pick(('near', 'behind', 'beside'))} the {dice.pick(words.PLACES).sg}"
    return f"there {right} {rest}", f"there {wrong} {rest}"


# --- agreement elsewhere -----------------------------------------------------------------------------


def determiner_noun(dice: Dice) -> Draw:
    """The girl sold this lamp. / *The girl sold these lamp."""
    pair = dice.pick((Noun("this", "these"), Noun("that", "those")))
    thing, right, wrong = dice.agreeing(dice.pick(words.THINGS), pair)
    who = dice.pick((*words.NAMES_MALE, *words.NAMES_FEMALE))
    verb = dice.pick(("sold", "bought", "carried", "took", "cleaned", "broke", "painted"))
    what = dice.pick(("", "old ", "new ", "small ", "heavy ")) + thing
    return f"{who} {verb} {right} {what}", f"{who} {verb} {wrong} {what}"


def anaphor_gender(dice: Dice) -> Draw:
    """The queen saw herself in the mirror. / *The queen saw himself in the mirror."""
    female = dice.flip()
    if dice.flip():
        who = dice.pick(words.NAMES_FEMALE if female else words.NAMES_MALE)
    else:
        who = f"the {dice.pick(words.FEMALES if female else words.MALES).sg}"
    right, wrong = dice.order("himself", "herself", swap=female)
    did = dice.pick(words.REFLEXIVE)
    return f"{who} {did.format(right)}", f"{who} {did.format(wrong)}"


def anaphor_number(dice: Dice) -> Draw:
    """The boys hid themselves behind the door. / *The boys hid himself behind the door."""
    nouns, pronoun = dice.pick(((words.MALES, "himself"), (words.FEMALES, "herself")))
    who, right, wrong = dice.agreeing(dice.pick(nouns), Noun(pronoun, "themselves"))
    did = dice.pick(words.REFLEXIVE)
    return f"the {who} {did.format(right)}", f"the {who} {did.format(wrong)}"


# --- verbs -------------------------------------------------------------------------------------------


def irregular_form(dice: Dice) -> Draw:
    """The man has broken the cup. / *The man has broke the cup."""
    verb = dice.pick(words.IRREGULAR)
    who, what = dice.pick(words.PEOPLE).sg, dice.pick(verb.objects)
    if dice.flip():
        return f"the {who} has {verb.participle} {what}", f"the {who} has {verb.past} {what}"
    end = f"{what} {dice.pick(('yesterday', 'last night', 'on Monday'))}"
    return f"the {who} {verb.past} {end}", f"the {who} {verb.participle} {end}"


def argument_structure(dice: Dice) -> Draw:
    """The girl carried the box. / *The girl vanished the box."""
    who = dice.pick(words.PEOPLE).sg
    takes_object, takes_none = dice.pick(words.TRANSITIVE).past, dice.pick(words.VANISHED)
    if dice.flip():
        end = f"the {dice.pick(words.THINGS).sg}"
        return f"the {who} {takes_object} {end}", f"the {who} {takes_none} {end}"
    end = dice.pick(words.HAPPENED)
    return f"the {who} {takes_none} {end}", f"the {who} {takes_object} {end}"


def tense_adverb(dice: Dice) -> Draw:
    """The baker will buy the boat tomorrow. / *The baker will buy the boat yesterday."""
    verb = dice.pick((*words.TRANSITIVE, *words.IRREGULAR))
    who = dice.pick(words.PEOPLE).sg
    what = dice.pick(verb.objects or tuple(f"the {thing.sg}" for thing in words.THINGS))
    future = dice.flip()
    did = f"the {who} {f'will {verb.base}' if future else verb.past} {what}"
    then, soon = dice.pick(
        (
            ("yesterday", "tomorrow"),
            ("last week", "next week"),
            ("last month", "next month"),
            ("last year", "next year"),
        )
    )
    right, wrong = dice.order(then, soon, swap=future)
    if then == "yesterday" and dice.flip():
        return f"{right} {did}", f"{wrong} {did}"
    return f"{did} {right}", f"{did} {wrong}"


# --- licensing and gaps ------------------------------------------------------------------------------


def negative_polarity(dice: Dice) -> Draw:
    """Nobody bought any bread. / *Somebody bought any bread."""
    who, verb = dice.pick(words.PEOPLE).sg, dice.pick(words.IRREGULAR)
    got = dice.pick(("bought", "found", "brought", "sold", "wanted", "carried"))
    negative, positive = dice.pick((("nobody", "somebody"), ("nobody", "everybody")))
    some = f"any {dice.pick(words.MASSES)}"
    kind = dice.pick(("ever", "any", "not"))
    if kind == "ever":
        end = f"{who} has ever {verb.participle} {dice.pick(verb.objects)}"
        return f"no {end}", f"the {end}"
    if kind == "any":
        return f"{negative} {got} {some}", f"{positive} {got} {some}"
    had = dice.pick(("bought", "found", "brought", "sold"))
    return f"the {who} has not {had} {some}", f"the {who} has now {had} {some}"


def filler_gap(dice: Dice) -> Draw:
    """Mary knew what the man received. / *Mary knew that the man received."""
    knower = dice.pick((*words.NAMES_MALE, *words.NAMES_FEMALE))
    knew = dice.pick(("knew", "remembered", "forgot", "said", "heard", "noticed", "understood"))
    clause = f"the {dice.pick(words.PEOPLE).sg} {dice.pick(words.TRANSITIVE).past}"
    if dice.flip():
        return f"{knower} {knew} what {clause}", f"{knower} {knew} that {clause}"
    clause += f" the {dice.pick(words.THINGS).sg}"
    return f"{knower} {knew} that {clause}", f"{knower} {knew} what {clause}"


# --- forms and order ---------------------------------------------------------------------------------


def comparative(dice: Dice) -> Draw:
    """The house is older than the tree. / *The house is old than the tree."""
    plain, more = dice.pick(words.COMPARED)
    nouns = (*words.THINGS, *words.PLACES)
    first = dice.pick(nouns)
    start, end = f"the {first.sg} is", f"the {dice.other(nouns, first).sg}"
    if dice.flip():
        return f"{start} {more} than {end}", f"{start} {plain} than {end}"
    return f"{start} as {plain} as {end}", f"{start} as {more} as {end}"


def pronoun_case(dice: Dice) -> Draw:
    """The king thanked him yesterday. / *The king thanked he yesterday."""
    subject, obj = dice.pick(words.PRONOUNS)
    who = dice.pick(words.PEOPLE).sg
    when = dice.pick(("yesterday", "last night", "on Monday", "in the garden"))
    kind = dice.pick(("subject", "object", "after preposition"))
    if kind == "subject":
        end = f"{dice.pick(words.RELATIONS)[1]} the {who}"
        return f"{subject} {end}", f"{obj} {end}"
    if kind == "object":
        start = f"the {who} {dice.pick(('helped', 'thanked', 'visited', 'praised', 'met'))}"
    else:
        start = f"the {who} {dice.pick(('waited for', 'walked with', 'looked at', 'spoke to'))}"
    return f"{start} {obj} {when}", f"{start} {subject} {when}"


def word_order(dice: Dice) -> Draw:
    """The old man took the key. / *The man old took the key."""
    verb = dice.pick((*words.TRANSITIVE, *words.IRREGULAR))
    noun = dice.pick(words.PEOPLE)
    who = noun.sg
    what = dice.pick(verb.objects or tuple(f"the {thing.sg}" for thing in words.THINGS))
    kind = dice.pick(("adjective", "negation", "auxiliary", "quantifier"))
    if kind == "adjective":
        adjective = dice.pick(words.ADJECTIVES)
        return f"the {adjective} {who} {verb.past} {what}", f"the {who} {adjective} {verb.past} {what}"
    if kind == "negation":
        return f"the {who} did not {verb.base} {what}", f"the {who} not did {verb.base} {what}"
    if kind == "auxiliary":
        return f"the {who} will {verb.base} {what}", f"the {who} {verb.base} will {what}"
    return f"all the {noun.pl} {verb.past} {what}", f"the all {noun.pl} {verb.past} {what}"


PHENOMENA: dict[str, Callable[[Dice], Draw]] = {
    template.__name__: template
    for template in (
        agreement_simple,
        agreement_prepositional,
        agreement_relative,
        existential,
        determiner_noun,
        anaphor_gender,
        anaphor_number,
        irregular_form,
        argument_structure,
        tense_adverb,
        negative_polarity,
        filler_gap,
        comparative,
        pronoun_case,
        word_order,
    )
}
