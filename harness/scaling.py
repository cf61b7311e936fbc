"""How a cost grows: the exponent over prompt lengths, and the batch size at which two methods break even.

Pure. Both take bootstrap draws of each measured point, so that what is uncertain there is uncertain here;
neither says anything about sizes that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from harness.errors import ConfigError
from harness.evaluate.intervals import Floats, percentile_interval

__all__ = ["BreakEven", "Exponent", "Point", "break_even", "length_exponent"]

CLEAR_SHARE = 0.95  # of the draws must agree on where the ratio is going


@dataclass(frozen=True)
class Point:
    """A measured value at a size, with bootstrap draws of it (float64 [draws]; None for one reading)."""

    size: float
    value: float
    draws: Floats | None = None


@dataclass(frozen=True, slots=True)
class Exponent:
    """`value` ~ size ** `exponent`, least squares in logarithms over sizes `first` to `last`.

    `lower` and `upper` are None where a point has one reading only. The interval covers the noise of
    the readings, not the misfit of a power law: that is what `local` shows, the exponents between
    neighbouring sizes. Where overhead dominates the short lengths, they rise along the sweep.
    """

    exponent: float
    lower: float | None
    upper: float | None
    first: float
    last: float
    points: int
    local: tuple[Exponent, ...] = ()


def length_exponent(points: Sequence[Point]) -> Exponent:
    """Fit a power law to at least two sizes; the local exponents come with it.

    Raises:
        ConfigError: fewer than two sizes, one given twice, or a value that is not positive.
    """
    ordered = sorted(points, key=lambda point: point.size)
    sizes = [point.size for point in ordered]
    if len(sizes) < 2 or len(set(sizes)) < len(sizes):
        raise ConfigError(f"an exponent needs at least two sizes, each once, not {sizes}")
    if any(not (point.value > 0 and point.size > 0) for point in ordered):
        raise ConfigError("an exponent needs positive sizes and values")
    pairs = pairwise(ordered) if len(ordered) > 2 else ()
    return _fit(ordered, tuple(_fit(pair, ()) for pair in pairs))


def _fit(points: Sequence[Point], local: tuple[Exponent, ...]) -> Exponent:
    x = np.log([point.size for point in points])
    centred = x - x.mean()
    slope = centred / (centred**2).sum()  # the weights of least squares: exponent = slope · log(value)
    exponent = float(slope @ np.log([point.value for point in points]))
    lower = upper = None
    drawn = _drawn(points)
    if drawn is not None:
        lower, upper = percentile_interval(slope @ np.log(drawn))
    return Exponent(exponent, lower, upper, points[0].size, points[-1].size, len(points), local)


def _drawn(points: Sequence[Point]) -> Floats | None:
    """Draws of all points, [points, draws]; None where one of them has none."""
    draws = [point.draws for point in points if point.draws is not None]
    return np.stack(draws) if len(draws) == len(points) else None


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where the ratio b/a of two costs crosses 1 between measured batch sizes.

    `outcome` is

    - ``crosses``: at `batch`; its bounds may be infinite: below the smallest or above the largest
      measured size in some of the draws;
    - ``below`` / ``above``: b costs less (or more) at every measured size, and the ratio moves away
      from 1 towards the larger (or the smaller) ones, so that a crossing could only lie outside;
    - ``none``: it is on one side throughout, and goes nowhere clearly.

    `better_below` says which side of the crossing is the good one for b. A ratio that crosses several
    times has one entry each.
    """

    outcome: str
    smallest: float
    largest: float
    batch: float | None = None
    lower: float | None = None
    upper: float | None = None
    better_below: bool | None = None
    share: float | None = None

    def __str__(self) -> str:
        if self.outcome == "below":
            return f"below {self.smallest:g}"
        if self.outcome == "above":
            return f"above {self.largest:g}"
        if self.batch is None:
            return "none"
        if self.lower is None or self.upper is None:
            return f"{self.batch:.3g}"
        return f"{self.batch:.3g} [{self._bound(self.lower)}, {self._bound(self.upper)}]"

    def _bound(self, value: float) -> str:
        if value == -math.inf:
            return f"below {self.smallest:g}"
        return f"above {self.largest:g}" if value == math.inf else f"{value:.3g}"


def break_even(points: Sequence[Point]) -> tuple[BreakEven, ...]:
    """Where b/a, measured at several batch sizes, crosses 1: by interpolation of logarithms.

    Args:
        points: `size` is the batch size, `value` the ratio of times (below 1: b is faster).

    Returns:
        Every crossing in the order of batch sizes, or one entry that says there is none.

    Raises:
        ConfigError: fewer than two batch sizes, one given twice, or a ratio that is not positive.
    """
    ordered = sorted(points, key=lambda point: point.size)
    sizes = [point.size for point in ordered]
    if len(sizes) < 2 or len(set(sizes)) < len(sizes):
        raise ConfigError(f"a break-even needs at least two batch sizes, each once, not {sizes}")
    if any(not point.value > 0 for point in ordered):
        raise ConfigError("a break-even needs positive ratios")
    x = np.log(sizes)
    y = np.log([point.value for point in ordered])
    stacked = _drawn(ordered)
    drawn = None if stacked is None else np.log(stacked)
    crossings = _crossings(x, y)
    if not crossings:
        return (_without_crossing(x, y, drawn, sizes),)
    found = []
    for place, rises in crossings:
        lower = upper = share = None
        if drawn is not None:
            lower, upper, share = _crossing_interval(x, drawn, place, rises)
        found.append(
            BreakEven(
                "crosses", sizes[0], sizes[-1], math.exp(place), lower, upper, better_below=rises, share=share
            )
        )
    return tuple(found)


def _crossings(x: Floats, y: Floats) -> list[tuple[float, bool]]:
    """The zeros of the line through the points, each with whether it rises there.

    A point at exactly 0 belongs to the side that it comes from, so that touching is no crossing.
    """
    found = []
    side = 0.0
    for index in range(len(x)):
        now = float(np.sign(y[index]))
        if now == 0:
            continue
        if side and now != side:
            # Zeros in between are where the line lies on the axis: the crossing is at the first of them.
            before = max(j for j in range(index) if y[j] != 0)
            if before + 1 < index:
                place = float(x[before + 1])
            else:
                place = float(x[before] + (x[index] - x[before]) * y[before] / (y[before] - y[index]))
            found.append((place, now > 0))
        side = now
    return found


def _crossing_interval(x: Floats, drawn: Floats, place: float, rises: bool) -> tuple[float, float, float]:
    """Bounds of a crossing (batch sizes, perhaps infinite), and the share of draws that have it.

    In each draw it is the nearest crossing of the same direction; a draw without one has it outside, on
    the side that the signs at the ends tell.
    """
    places = np.empty(drawn.shape[1])
    for draw in range(drawn.shape[1]):
        same = [at for at, up in _crossings(x, drawn[:, draw]) if up == rises]
        if same:
            places[draw] = min(same, key=lambda at: abs(at - place))
        else:
            # Rising and still below 1 at the end: it would cross later, if at all.
            later = (drawn[-1, draw] < 0) == rises
            places[draw] = math.inf if later else -math.inf
    share = float(np.isfinite(places).mean())
    ordered = np.sort(places)
    tail = 0.025 * (len(ordered) - 1)
    # Order statistics, not interpolated ones: infinities cannot be averaged.
    low, high = ordered[math.floor(tail)], ordered[math.ceil(len(ordered) - 1 - tail)]
    lower, upper = (float(np.exp(each)) if math.isfinite(each) else float(each) for each in (low, high))
    return lower, upper, share


def _without_crossing(x: Floats, y: Floats, drawn: Floats | None, sizes: Sequence[float]) -> BreakEven:
    centred = x - x.mean()
    trend = float(centred @ y)
    is_clear = abs(trend) > 1e-12  # rounding is no trend
    if drawn is not None:
        share = float(np.mean(np.sign(centred @ drawn) == np.sign(trend)))
        is_clear = is_clear and share >= CLEAR_SHARE
    if not is_clear:
        return BreakEven("none", sizes[0], sizes[-1])
    is_better = bool(y[y != 0][-1] < 0)  # a trend that is clear leaves 1 somewhere
    # Faster and losing ground, or slower and gaining it: the crossing could only lie at larger batches.
    beyond = (trend > 0) == is_better
    better_below = is_better if beyond else not is_better
    return BreakEven("above" if beyond else "below", sizes[0], sizes[-1], better_below=better_below)
