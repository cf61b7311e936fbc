"""What a score means beyond its name: a perplexity over other windows is another quantity. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Score", "definitions", "windows_in"]

_WINDOWS = re.compile(r"seq_len=(\d+), windows=(\d+)")


class Score(NamedTuple):
    """Of a record what decides its meaning; `limit` is that of its sweep, for scores of tasks only."""

    task: str | None
    metric: str | None
    note: str | None
    limit: int | None


def definitions(scores: Sequence[Score]) -> list[str]:
    """For each score the text that tells it from others of its task and metric; mostly empty.

    A limit is always said. The length of windows is said where scores of one metric were taken over
    windows of several lengths, and their number where that differs too: then the tokens are others.

    >>> one = Score("kjv", "token_perplexity", "seq_len=128, windows=9, dropped_tokens=0", None)
    >>> definitions([one, one._replace(note="seq_len=512, windows=2, dropped_tokens=0")])
    ['windows of 128', 'windows of 512']
    >>> definitions([one, one._replace(limit=10)])
    ['', 'limit 10']
    """
    ways = [_ways(score) for score in scores]
    seen: dict[tuple[str | None, str | None, int | None], set[tuple[str, ...]]] = {}
    for score, way in zip(scores, ways, strict=True):
        seen.setdefault((score.task, score.metric, score.limit), set()).add(way)
    return [
        _said(score, way, seen[score.task, score.metric, score.limit])
        for score, way in zip(scores, ways, strict=True)
    ]


def windows_in(note: str | None) -> str:
    """The part of a record's note that says which windows a perplexity was taken over, or nothing.

    >>> windows_in("seq_len=128, windows=9, dropped_tokens=0")
    'seq_len=128, windows=9'
    """
    match = _WINDOWS.search(note or "")
    return match.group() if match else ""


def _ways(score: Score) -> tuple[str, ...]:
    match = _WINDOWS.search(score.note or "")
    return match.groups() if match else ()


def _said(score: Score, way: tuple[str, ...], seen: Iterable[tuple[str, ...]]) -> str:
    said = []
    if way:
        length, count = way
        others = [other for other in seen if other and other != way]
        if any(other[0] != length for other in others):
            said.append(f"windows of {length}")
        if any(other[0] == length for other in others):
            said.append(f"{count} windows")
    if score.limit is not None:
        said.append(f"limit {score.limit}")
    return ", ".join(said)
