"""Which of several choices no other one beats. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["on_front"]


def on_front(points: Sequence[tuple[float, float]], x_better: str, y_better: str) -> list[bool]:
    """For each (x, y), whether no other point is at least as good in both and better in one.

    Args:
        x_better, y_better: ``lower`` or ``higher``. No value may be NaN.

    >>> on_front([(1, 5), (2, 3), (3, 4)], "lower", "lower")
    [True, True, False]
    """
    costs = [
        (x if x_better == "lower" else -x, y if y_better == "lower" else -y, index)
        for index, (x, y) in enumerate(points)
    ]
    found = [False] * len(points)
    best_y, last_x = math.inf, math.nan
    for x, y, index in sorted(costs):
        if y < best_y or (y == best_y and x == last_x):
            found[index] = True
            best_y, last_x = y, x
    return found
