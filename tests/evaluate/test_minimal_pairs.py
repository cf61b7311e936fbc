"""The generated sentences: as many as promised, minimal, distinct and without slips of the templates."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from harness.errors import ConfigError
from harness.evaluate import pair_words as words
from harness.evaluate.minimal_pairs import PHENOMENA, minimal_pairs

PAIRS = minimal_pairs()
DETERMINERS = {"this": "sg", "that": "sg", "these": "pl", "those": "pl"}


def of(phenomenon):
    return [pair for pair in PAIRS if pair.phenomenon == phenomenon]


def test_ten_or_more_phenomena_of_a_hundred_pairs():
    assert len(PHENOMENA) >= 10
    assert Counter(pair.phenomenon for pair in PAIRS) == dict.fromkeys(PHENOMENA, 100)


def test_no_sentence_occurs_twice():
    sentences = [sentence for pair in PAIRS for sentence in (pair.good, pair.bad)]
    assert len(set(sentences)) == len(sentences)


def test_the_start_holds_as_many_of_each():
    assert {pair.phenomenon for pair in PAIRS[: len(PHENOMENA)]} == set(PHENOMENA)


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_pairs_are_minimal(phenomenon):
    for pair in of(phenomenon):
        good, bad = pair.good[:-1].split(), pair.bad[:-1].split()
        assert len(good) == len(bad)
        if phenomenon == "word_order":
            assert Counter(map(str.lower, good)) == Counter(map(str.lower, bad))
        else:
            assert sum(g != b for g, b in zip(good, bad, strict=True)) == 1, pair


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_sentences_are_well_formed(phenomenon):
    for pair in of(phenomenon):
        for sentence in (pair.good, pair.bad):
            assert re.fullmatch(r"[A-Z][A-Za-z ]*[a-z]\.", sentence), sentence
            assert "  " not in sentence
            assert not re.search(r"\ba [aeiou]", sentence), sentence


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others():
    assert minimal_pairs(5, seed=0) == minimal_pairs(5, seed=0)
    assert minimal_pairs(5, seed=0) != minimal_pairs(5, seed=1)


def test_more_than_the_templates_give_is_refused():
    with pytest.raises(ConfigError, match="the templates of"):
        minimal_pairs(6000)


def number_of(noun):
    for known in (*words.PEOPLE, *words.THINGS, *words.MALES, *words.FEMALES):
        if noun in known:
            return "sg" if noun == known.sg else "pl"
    raise AssertionError(noun)


def test_determiners_agree_in_the_good_sentence_only():
    for pair in of("determiner_noun"):
        for sentence, agrees in ((pair.good, True), (pair.bad, False)):
            _, _, determiner, *_, noun = sentence[:-1].split()
            assert (DETERMINERS[determiner] == number_of(noun)) is agrees, sentence


@pytest.mark.parametrize("phenomenon", ["agreement_prepositional", "agreement_relative"])
def test_the_verb_agrees_with_the_head_and_disagrees_with_what_stands_between(phenomenon):
    plurals = {"are": "pl", "were": "pl", "is": "sg", "was": "sg"}
    for pair in of(phenomenon):
        good = pair.good[:-1].split()
        position = next(i for i, (g, b) in enumerate(zip(good, pair.bad.split(), strict=False)) if g != b)
        assert plurals[good[position]] == number_of(good[1]), pair
        between = [
            word for word in good[2:position] if any(word in noun for noun in (*words.PLACES, *words.PEOPLE))
        ]
        assert len(between) == 1
        place = any(between[0] == noun.pl for noun in (*words.PLACES, *words.PEOPLE))
        assert ("pl" if place else "sg") != number_of(good[1]), pair


def test_reflexives_match_in_the_good_sentence_only():
    males = {noun.sg for noun in words.MALES} | set(words.NAMES_MALE)
    females = {noun.sg for noun in words.FEMALES} | set(words.NAMES_FEMALE)
    for pair in of("anaphor_gender"):
        who = pair.good.split()[1] if pair.good.startswith("The ") else pair.good.split()[0]
        assert who in males | females
        assert ("himself" in pair.good) is (who in males)
        assert ("himself" in pair.bad) is (who in females)


def test_both_numbers_and_both_directions_occur_about_equally():
    good = [pair.good for pair in of("existential")]
    assert 25 < sum(" a " in sentence for sentence in good) < 75
    good = [pair.good for pair in of("argument_structure")]
    assert 25 < sum(any(verb.past in sentence for verb in words.TRANSITIVE) for sentence in good) < 75
