"""The data of the task `kjv_books`: sentences of the held-out books, each with the book it is from."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any

from harness.corpus import kjv_held_out_chapters
from harness.keys import content_key

__all__ = ["data_revision", "load", "sentences"]

_END = re.compile(r"(?<=[.?!:;]) ")
_FEWEST_WORDS = 6


def sentences() -> dict[str, list[dict[str, str]]]:
    """Clauses that end in ``. ? ! : ;``, of odd chapters for training and of even ones for judging.

    Those of fewer than six words are left out, and so is one of an even chapter that an odd one holds too.
    """
    found: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for chapter in kjv_held_out_chapters():
        split = "train" if chapter.number % 2 else "test"
        for sentence in _END.split(chapter.text):
            if len(sentence.split()) >= _FEWEST_WORDS:
                found[split].append({"sentence": sentence, "book": chapter.book})
    trained = {row["sentence"] for row in found["train"]}
    of_book: dict[str, list[dict[str, str]]] = {}
    for row in found["test"]:
        if row["sentence"] not in trained:
            of_book.setdefault(row["book"], []).append(row)
    # Books take turns, so that the first n sentences hold about as many of each.
    turns = [row for rows in zip_longest(*of_book.values()) for row in rows if row is not None]
    return {"train": found["train"], "test": turns}


def load(**_: Any) -> dict[str, Any]:
    """One document for each sentence."""
    from datasets import Dataset

    return {split: Dataset.from_list(rows) for split, rows in sentences().items()}


def data_revision(**_: Any) -> str:
    """The hash of the sentences."""
    return content_key(dict(sentences()))
