"""How much faster: the ratio of two models' times in the same rounds, with an exact interval.

A ratio within a round cancels what slows both: clocks, temperature, neighbours. The interval of the
median ratio is that of the sign test (order statistics of the binomial distribution): it assumes nothing
about the shape of the distribution and covers at least at its rate for any number of rounds, where a
bootstrap of a handful of rounds covers too rarely.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binom

from harness.measure.timing import Run

__all__ = ["LEAST_ROUNDS", "Ratio", "median_interval", "ratios", "speedups"]

LEAST_ROUNDS = 8
"""Fewer than six readings have no interval of 95 % at all."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of paired ratios with its interval; None where there are too few."""

    value: float
    lower: float | None
    upper: float | None
    samples: tuple[float, ...]


def ratios(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """The ratios `of[i] / to[i]` of paired readings."""
    samples = tuple(a / b for a, b in zip(of, to, strict=True))
    lower, upper = median_interval(samples)
    return Ratio(statistics.median(samples), lower, upper, samples)


def median_interval(
    samples: Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """The distribution-free interval of the median (Hahn and Meeker 1991, section 5.2).

    Its bounds are two of the readings themselves; (None, None) where there are too few of them.
    """
    ordered, n = sorted(samples), len(samples)
    # The k-th smallest and k-th largest bound the median unless fewer than k readings lie on a side.
    k = int(binom.ppf((1 - confidence) / 2, n, 0.5))
    while k > 0 and 2 * binom.cdf(k - 1, n, 0.5) > 1 - confidence:
        k -= 1
    if k == 0:
        return None, None
    return ordered[k - 1], ordered[n - k]


def speedups(baseline: Sequence[Run], variant: Sequence[Run]) -> dict[str, Ratio]:
    """Baseline time over variant time of the same rounds, for ``prefill``, ``decode`` (the median step
    of each run; absent where nothing is decoded) and ``end_to_end``: above 1 is faster."""
    found = {
        "prefill": ratios([run[0] for run in baseline], [run[0] for run in variant]),
        "end_to_end": ratios([run[-1] for run in baseline], [run[-1] for run in variant]),
    }
    if all(len(run) > 2 for run in [*baseline, *variant]):
        steps = [[statistics.median(run[1:-1]) for run in runs] for runs in (baseline, variant)]
        found["decode"] = ratios(*steps)
    return found
