"""Readers of public evaluation sets that lie beside the checkout, or in the folder HARNESS_TEST_DATA.

For tests and for comparing with published figures; nothing here is part of the distribution.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

_ARTICLE = re.compile(r"^ = [^=].* = \n$")


def data_folder() -> Path:
    """Where the files are looked for."""
    given = os.environ.get("HARNESS_TEST_DATA")
    return Path(given) if given else Path(__file__).parents[3] / "shared" / "data"


def data_revision(file: str, training_file: str | None = None, **_: Any) -> str:
    """The content hash of the files that a task reads."""
    from harness.keys import file_hash

    files = [file] if training_file is None else [file, training_file]
    return " ".join(file_hash(data_folder() / name) for name in files)


def json_lines(file: str, training_file: str | None = None, **_: Any) -> dict[str, Any]:
    """Records of a `.jsonl.gz` file, and of one to train on where there is one."""
    from datasets import Dataset

    splits = {"test": file} if training_file is None else {"train": training_file, "test": file}
    found = {}
    for split, name in splits.items():
        with gzip.open(data_folder() / name, "rt", encoding="utf-8") as lines:
            found[split] = Dataset.from_list([json.loads(line) for line in lines])
    return found


def wikitext(file: str, **_: Any) -> dict[str, Any]:
    """Articles of a raw WikiText file, such that joining them gives the text of the GPTQ code.

    That code joins the rows of the hub's data set by blank lines; a row is a line with its end, or
    nothing for a blank line.
    """
    from datasets import Dataset

    with lzma.open(data_folder() / file, "rt", encoding="utf-8") as lines:
        rows = [line if line.strip() else "" for line in lines]
    starts = [number for number, row in enumerate(rows) if _ARTICLE.match(row)]
    bounds = [0, *starts[1:], len(rows)]
    articles = ["\n\n".join(rows[a:b]) for a, b in pairwise(bounds)]
    return {"test": Dataset.from_list([{"text": article} for article in articles])}


# WinoGrande scores the end of the sentence after each of two beginnings.


def winogrande_answer(document: dict[str, Any]) -> int:
    return int(document["label"])


def winogrande_beginnings(document: dict[str, Any]) -> list[str]:
    before = document["sentence"].partition("_")[0]
    return [before + document["option1"], before + document["option2"]]


def winogrande_end(document: dict[str, Any]) -> str:
    return str(document["sentence"].partition("_")[2]).strip()
