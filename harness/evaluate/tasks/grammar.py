"""The data and the scoring of the task `grammar`: the likelier sentence of a minimal pair."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from harness.evaluate.minimal_pairs import minimal_pairs
from harness.keys import content_key

__all__ = ["choices", "data_revision", "load", "score"]


def load(**_: Any) -> dict[str, Any]:
    """lm-eval's splits: one document for each pair."""
    from datasets import Dataset

    return {"test": Dataset.from_list([asdict(pair) for pair in minimal_pairs()])}


def data_revision(**_: Any) -> str:
    """The hash of the sentences."""
    return content_key({"pairs": [[p.phenomenon, p.good, p.bad] for p in minimal_pairs()]})


def choices(document: dict[str, str]) -> list[str]:
    """Both sentences, the grammatical one first."""
    return [document["good"], document["bad"]]


def score(document: dict[str, str], results: list[tuple[float, bool]]) -> dict[str, float]:
    """1 where the grammatical sentence is strictly likelier: a tie is no knowledge of grammar."""
    (good, _), (bad, _) = results
    right = float(good > bad)
    return {"acc": right, f"acc_{document['phenomenon']}": right}
