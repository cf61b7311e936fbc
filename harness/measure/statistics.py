"""From raw readings to a value with an interval.

The value of a timed record is the median, because timings have a long right tail; its interval is a
percentile bootstrap of the median (Efron 1979), seeded, so that the same readings always give the
same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.errors import ConfigError, NumericalFailure
from harness.records import Record

__all__ = [
    "PERCENTILES",
    "Summary",
    "median_draws",
    "percentiles",
    "record_from_samples",
    "speedup",
    "summarize",
]

RESAMPLES = 1000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20231115
PERCENTILES = (10, 50, 90, 99)
_CHUNK_ELEMENTS = 2_000_000  # bounds the memory of the index matrix: 16 MB

_TIME_UNITS = frozenset({"s", "ms", "us", "s/token"})


@dataclass(frozen=True, slots=True)
class Summary:
    """A set of readings in numbers, all in the unit of the readings.

    `lower` and `upper` bound the 95 % interval of the median; None for a single reading.
    """

    median: float
    lower: float | None
    upper: float | None
    p10: float
    p50: float
    p90: float
    p99: float
    n: int


def summarize(samples: Sequence[float]) -> Summary:
    """Median with its bootstrap interval, and percentiles.

    Raises:
        ConfigError: there is no reading.
        NumericalFailure: a reading is NaN or infinite.
    """
    readings = np.asarray(samples, dtype=np.float64).reshape(-1)
    if readings.size == 0:
        raise ConfigError("there are no readings to summarise")
    if not np.isfinite(readings).all():
        raise NumericalFailure("a reading is NaN or infinite")
    lower, upper = _median_interval(readings) if readings.size > 1 else (None, None)
    p10, p50, p90, p99 = percentiles(readings).values()
    return Summary(float(np.median(readings)), lower, upper, p10, p50, p90, p99, readings.size)


def percentiles(samples: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Percentiles 10, 50, 90 and 99, linear between readings.

    >>> percentiles([0.1, 0.2, 0.3])["p50"]
    0.2
    """
    found = np.percentile(np.asarray(samples, dtype=np.float64), PERCENTILES)
    return {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def median_draws(
    samples: Sequence[float] | NDArray[np.float64], generator: np.random.Generator, draws: int = RESAMPLES
) -> NDArray[np.float64]:
    """Bootstrap draws of the median (Efron 1979), float64 [draws]."""
    readings = np.asarray(samples, dtype=np.float64)
    rows_at_once = max(1, _CHUNK_ELEMENTS // readings.size)
    return np.concatenate(
        [
            np.median(readings[generator.integers(0, readings.size, (rows, readings.size))], axis=1)
            for rows in _chunks(draws, rows_at_once)
        ]
    )


def record_from_samples(
    metric: str,
    unit: str,
    samples: Sequence[float],
    *,
    mode: str | None = None,
    note: str | None = None,
    scale: float = 1.0,
) -> Record:
    """A record whose value is the median of the readings times `scale`, with all of them kept.

    Raises:
        ConfigError: there is no reading.
        NumericalFailure: a reading is not finite, or a time is not positive. A time that is zero or
            negative was not measured but computed, by subtracting one noisy total from another.
    """
    scaled = [float(sample) * scale for sample in samples]
    if unit in _TIME_UNITS and any(sample <= 0 for sample in scaled):
        raise NumericalFailure(f"{metric}: a measured time must be positive, not {min(scaled):g}")
    try:
        summary = summarize(scaled)
    except (ConfigError, NumericalFailure) as error:
        raise type(error)(f"{metric}: {error}") from None
    return Record(
        metric=metric,
        value=summary.median,
        unit=unit,
        lower=summary.lower,
        upper=summary.upper,
        n=summary.n,
        samples=tuple(scaled),
        mode=mode,
        note=note,
    )


def speedup(baseline_s: float, latency_s: float) -> float:
    """How many times faster: 2.95 s against 1 s is 2.95, which is +195 %.

    Not its inverse (0.3389, printed as "+33.89 %"), and never a difference of percentages.

    >>> round(speedup(2.95, 1.0), 2)
    2.95

    Raises:
        ConfigError: a latency that is not a positive number.
    """
    for latency in (baseline_s, latency_s):
        if not (math.isfinite(latency) and latency > 0):
            raise ConfigError(f"a latency must be a positive number of seconds, not {latency!r}")
    return baseline_s / latency_s


def _median_interval(readings: NDArray[np.float64]) -> tuple[float, float]:
    medians = median_draws(readings, np.random.default_rng(BOOTSTRAP_SEED))
    tail = 100 * (1 - CONFIDENCE) / 2
    lower, upper = np.percentile(medians, (tail, 100 - tail))
    return float(lower), float(upper)


def _chunks(total: int, size: int) -> list[int]:
    full, rest = divmod(total, size)
    return [size] * full + ([rest] if rest else [])
