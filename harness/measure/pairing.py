"""How much faster: the ratio of two models' times in the same rounds, with an exact interval.

A ratio within a round cancels what slows both: clocks, temperature, neighbours. The interval of the
median ratio is that of the sign test (order statistics of the binomial distribution): it assumes nothing
about the shape of the distribution and covers at least at its rate for any number of rounds, where a
bootstrap of a handful of rounds covers too rarely.

Rounds alone do not say everything. Where the buffers of a CUDA graph lie moves its time by some tenths of a
per cent for as long as it lives: two captures of one model differ by more than their rounds do. So both
models are captured several times, and then it is captures, not rounds, that are drawn at random. The ratio of
each pair of captures is the median of its rounds, and the interval reaches from the smallest to the largest:
that of Mann and Whitney (1947) for the shift between two samples, here of logarithms. Of four against four it
misses one time in 35.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from harness.measure.timing import Run

__all__ = [
    "ENOUGH_CAPTURES",
    "LEAST_ROUNDS",
    "Ratio",
    "captured_interval",
    "median_interval",
    "ratios",
    "speedups",
]

ENOUGH_CAPTURES = 4
"""Of three on either side the interval would cover 90 times in 100."""

LEAST_ROUNDS = 8
"""Fewer than six readings have no interval of 95 % at all."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of paired ratios with its interval; None where there are too few."""

    value: float
    lower: float | None
    upper: float | None
    samples: tuple[float, ...]


Pairs = Sequence[tuple[int, int]]
"""Which captures of the two models ran in each round."""


def ratios(of: Sequence[float], to: Sequence[float], captures: Pairs = ()) -> Ratio:
    """The ratios `of[i] / to[i]` of paired readings; `captures`: which ones they are of."""
    samples = tuple(a / b for a, b in zip(of, to, strict=True))
    lower, upper = captured_interval(samples, captures) or median_interval(samples)
    return Ratio(statistics.median(samples), lower, upper, samples)


def captured_interval(samples: Sequence[float], captures: Pairs) -> tuple[float, float] | None:
    """From the smallest to the largest median of a pair of captures; None where they are too few."""
    if not captures or any(len(set(side)) < ENOUGH_CAPTURES for side in zip(*captures, strict=True)):
        return None
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for pair, sample in zip(captures, samples, strict=True):
        found[pair].append(sample)
    medians = [statistics.median(each) for each in found.values()]
    return min(medians), max(medians)


def median_interval(
    samples: Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """The distribution-free interval of the median (Hahn and Meeker 1991, section 5.2).

    Its bounds are two of the readings themselves; (None, None) where there are too few of them.
    """
    from scipy.stats import binom  # half a second that commands which measure nothing need not wait

    ordered, n = sorted(samples), len(samples)
    # The k-th smallest and k-th largest bound the median unless fewer than k readings lie on a side.
    k = int(binom.ppf((1 - confidence) / 2, n, 0.5))
    while k > 0 and 2 * binom.cdf(k - 1, n, 0.5) > 1 - confidence:
        k -= 1
    if k == 0:
        return None, None
    return ordered[k - 1], ordered[n - k]


def speedups(baseline: Sequence[Run], variant: Sequence[Run], captures: Pairs = ()) -> dict[str, Ratio]:
    """Baseline time over variant time of the same rounds, for ``prefill``, ``decode`` (the median step
    of each run; absent where nothing is decoded) and ``end_to_end``: above 1 is faster."""
    found = {
        "prefill": ratios([run[0] for run in baseline], [run[0] for run in variant], captures),
        "end_to_end": ratios([run[-1] for run in baseline], [run[-1] for run in variant], captures),
    }
    if all(len(run) > 2 for run in [*baseline, *variant]):
        steps = [[statistics.median(run[1:-1]) for run in runs] for runs in (baseline, variant)]
        found["decode"] = ratios(steps[0], steps[1], captures)
    return found
