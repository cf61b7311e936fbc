"""Which of several choices no other one beats. Pure."""

from __future__ import annotations

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
    best: tuple[float, float] | None = None  # the last of the front so far; the first may be infinite
    for x, y, index in sorted(costs):
        if best is None or y < best[1] or (x, y) == best:
            found[index] = True
            best = x, y
    return found
