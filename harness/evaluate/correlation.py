"""Correlation of a similarity with human scores, and of two variants on the same pairs. Numpy and scipy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from harness.errors import NumericalFailure
from harness.evaluate.intervals import RESAMPLES, Floats, generator, percentile_interval
from harness.evaluate.paired import Difference, PairedOutcome, sign_flip_test

__all__ = ["CORRELATIONS", "compare_correlations", "correlation", "correlation_draws"]

CORRELATIONS = ("spearman", "pearson")
_VALUES_AT_ONCE = 2_000_000


def correlation(kind: str, values: Sequence[float] | Floats, scores: Sequence[float] | Floats) -> float:
    """Pearson's correlation coefficient, or Spearman's: Pearson's of the ranks, ties sharing their mean.

    Raises:
        NumericalFailure: all values are equal, so that it does not exist.
    """
    result = float(_correlations(kind, np.array([values]), np.array([scores]))[0])
    if not np.isfinite(result):
        raise NumericalFailure(
            f"{kind} of {len(values)} values does not exist: they are equal, or not finite"
        )
    return result


def correlation_draws(
    kind: str,
    values: Sequence[float] | Floats,
    scores: Sequence[float] | Floats,
    chosen: npt.NDArray[np.int64],
) -> Floats:
    """The coefficient of each resample, [resamples]; `chosen` are the items' indices, [resamples, n].

    A resample whose values are all equal has none and gives 0.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    step = max(1, _VALUES_AT_ONCE // chosen.shape[1])
    parts = [
        _correlations(kind, first[rows], second[rows])
        for rows in (chosen[start : start + step] for start in range(0, len(chosen), step))
    ]
    return np.nan_to_num(np.concatenate(parts), nan=0.0)


def compare_correlations(
    kind: str, a: Sequence[float], b: Sequence[float], scores: Sequence[float], seed: int = 0
) -> PairedOutcome:
    """Whether two variants' similarities of the same pairs correlate differently with the human scores.

    The interval of `b - a` resamples pairs. For the test the coefficient r is written as a mean over pairs,
    of ``u t - r (u² + t² - 2) / 2`` for standardised values (or ranks) u and scores t: its linear part, so
    that what spreads is what spreads in r. Swapping what the variants say of a pair flips the sign of that
    pair's part of the difference (`sign_flip_test`).
    """
    n = len(scores)
    rng = generator(seed, f"{kind} difference")
    chosen = rng.integers(0, n, size=(RESAMPLES, n))
    draws = correlation_draws(kind, b, scores, chosen) - correlation_draws(kind, a, scores, chosen)
    terms = _parts(kind, b, scores) - _parts(kind, a, scores)
    if not np.isfinite(terms).all():
        raise NumericalFailure(f"{kind} of {n} values does not exist: they are equal, or not finite")
    normal = NormalDist()
    detectable = (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * float(draws.std(ddof=1))
    difference = Difference(float(terms.mean()), *percentile_interval(draws))
    return PairedOutcome(n, difference, sign_flip_test(terms, None, seed), "sign flips", detectable, None)


def _parts(kind: str, values: Sequence[float], scores: Sequence[float]) -> Floats:
    """What each pair contributes to the coefficient, [n]; their mean is the coefficient."""
    u, t = (_standardised(kind, np.array([each]))[0] for each in (values, scores))
    r = (u * t).mean()
    result: Floats = u * t - r * (u**2 + t**2 - 2) / 2
    return result


def _correlations(kind: str, values: Floats, scores: Floats) -> Floats:
    """Row by row, [rows, n] with [rows, n]."""
    products = _standardised(kind, values) * _standardised(kind, scores)
    result: Floats = products.mean(axis=1)
    return result


def _standardised(kind: str, values: Floats) -> Floats:
    """Rows with mean 0 and variance 1; NaN where all values are equal."""
    rows = np.asarray(values, dtype=np.float64)
    if kind == "spearman":
        from scipy.stats import rankdata

        rows = rankdata(rows, axis=1, nan_policy="propagate")
    centred = rows - rows.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1, keepdims=True)
    result: Floats = centred / np.where(deviation > 0, deviation, np.nan)
    return result
