"""95 % intervals: Wilson and Tango for shares, percentile bootstrap for the rest. Only numpy."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "CONFIDENCE",
    "RESAMPLES",
    "bootstrap_ratio",
    "bootstrap_statistic",
    "bootstrap_weighted_mean",
    "changed_share",
    "fallen_to",
    "generator",
    "percentile_interval",
    "sum_of_independent",
    "wilson",
]

CONFIDENCE = 0.95
RESAMPLES = 1000
_DRAWS_AT_ONCE = 2_000_000  # indices held in memory at a time

Floats = npt.NDArray[np.float64]


def wilson(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval for a share of `k` in `n` (Wilson 1927): sane at 0, at 1 and for small n."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"a share needs 0 <= k <= n and n > 0, not k={k}, n={n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exact; rounding must not put it beyond the share itself.
    lower = 0.0 if k == 0 else centre - half
    upper = 1.0 if k == n else centre + half
    return lower, upper


def changed_share(lost: float, won: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval for ``(won - lost) / n``, the change of a share over the same `n` items.

    Tango (1998, Statistics in Medicine 17). Where few items changed sides, or none, or all to one side, a
    bootstrap sees no spread and claims to know the difference; this is as wide as Wilson's then.

    Args:
        lost, won: how many items changed to the one and to the other side; of weighted items what they
            count for, of an effective number `n`.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def score(difference: float) -> float:
        # How many standard errors `won - lost` lies from what is expected at this difference, with the
        # likeliest share of lost items given it.
        b = (2 * n - won + lost) * difference - won - lost
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        distance = won - lost - n * difference
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    value = (won - lost) / n
    # At the ends the bound is exact: a share cannot change by more than 1.
    lower = -1.0 if value == -1 else fallen_to(z, score, -1.0, value)
    upper = 1.0 if value == 1 else fallen_to(-z, score, value, 1.0)
    return lower, upper


def fallen_to(wanted: float, function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls between two places reaches this value."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > wanted else (low, middle)
    return (low + high) / 2


def sum_of_independent(
    parts: Iterable[tuple[float, float, float, float]],
) -> tuple[float, float, float]:
    """A weighted sum of independent readings with its interval: value, lower, upper.

    MOVER (Zou and Donner 2008, Statistics in Medicine 27): each side of the interval is the root of the sum
    of squares of the parts' own sides, so lopsided intervals stay lopsided.

    Args:
        parts: of each reading its value, lower and upper bound, and the weight, which may be negative.
    """
    value, below, above = 0.0, [0.0], [0.0]
    for reading, low, high, weight in parts:
        point = weight * reading
        first, last = sorted((weight * low, weight * high))
        value += point
        below.append(point - first)
        above.append(last - point)
    return value, value - math.hypot(*below), value + math.hypot(*above)


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on the seed and a name, so that records do not share draws."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def bootstrap_weighted_mean(
    values: Sequence[float] | Floats,
    rng: np.random.Generator,
    weights: Sequence[float] | Floats | None = None,
    resamples: int = RESAMPLES,
) -> Floats:
    """Bootstrap draws of ``sum(weights * values) / sum(weights)``, float64 [resamples].

    The unit that is resampled is the item: a document, a window of tokens.
    """
    array = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(array) if weights is None else np.asarray(weights, dtype=np.float64)
    return bootstrap_ratio(array * weight, weight, rng, resamples)


def bootstrap_ratio(
    numerators: Sequence[float] | Floats,
    denominators: Sequence[float] | Floats,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Floats:
    """Bootstrap draws of ``sum(numerators) / sum(denominators)``, float64 [resamples].

    An item may count for nothing (an empty document). A resample of such items alone has no ratio and is
    left out, so that there are fewer draws.
    """
    upper, lower = (np.asarray(each, dtype=np.float64) for each in (numerators, denominators))
    sums = np.empty((2, resamples))
    step = max(1, _DRAWS_AT_ONCE // len(upper))
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        chosen = rng.integers(0, len(upper), size=(count, len(upper)))
        sums[:, first : first + count] = upper[chosen].sum(axis=1), lower[chosen].sum(axis=1)
    there = sums[1] != 0
    draws: Floats = sums[0, there] / sums[1, there]
    return draws


def bootstrap_statistic(
    values: Sequence[Any],
    statistic: Callable[[list[Any]], float],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Floats:
    """Bootstrap draws of any statistic of a list of items (BLEU, F1 ...), float64 [resamples]."""
    draws = np.empty(resamples)
    for number in range(resamples):
        chosen = rng.integers(0, len(values), size=len(values))
        draws[number] = statistic([values[index] for index in chosen])
    return draws


def percentile_interval(draws: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The central part of the draws."""
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(draws, [tail, 1 - tail])
    return float(lower), float(upper)
