"""Long lists of values in parts that one statement takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["chunks"]

_CHUNK = 10_000  # parameters of one statement: SQLite takes 32,766, PostgreSQL 65,535
T = TypeVar("T")


def chunks(values: Sequence[T]) -> list[Sequence[T]]:
    """The values in parts that one statement takes; no part where there are none.

    >>> chunks([3, 1, 2]), chunks([])
    ([[3, 1, 2]], [])
    """
    return [values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK)]
