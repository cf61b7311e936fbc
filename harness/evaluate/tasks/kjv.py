"""The data of the task `kjv`: the chapters that nothing in the project trains on."""

from __future__ import annotations

from typing import Any

from harness.corpus import kjv_held_out_chapters
from harness.keys import content_key

__all__ = ["data_revision", "load"]


def load(**_: Any) -> dict[str, Any]:
    """lm-eval's splits: one document for each chapter."""
    from datasets import Dataset

    chapters = kjv_held_out_chapters()
    rows = [{"book": c.book, "chapter": c.number, "text": c.text} for c in chapters]
    return {"test": Dataset.from_list(rows)}


def data_revision(**_: Any) -> str:
    """The hash of the text."""
    return content_key({"chapters": [[c.book, c.number, c.text] for c in kjv_held_out_chapters()]})
