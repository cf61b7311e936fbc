"""How two times compare: by paired rounds, by a control, or as they stand. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from harness.comparability import base_mode
from harness.evaluate.intervals import Floats, generator, percentile_interval
from harness.measure.statistics import median_draws

__all__ = ["CONTROL", "SPEEDUPS", "Reading", "TimingRatio", "across", "timing_ratio"]

CONTROL = "control_latency"
DRAWS = 2000
MIN_SAMPLES = 3
DRIFT = 0.10  # of the control: beyond it the machine was not the same

SPEEDUPS: Mapping[str, str] = {
    "prefill_latency": "prefill_speedup",
    "prefill_throughput": "prefill_speedup",
    "decode_latency": "decode_speedup",
    "decode_throughput": "decode_speedup",
    "end_to_end_latency": "end_to_end_speedup",
}
"""The paired record of each metric."""

_GROWING = ("_throughput", "_per_s", "_mbu", "_mfu")  # with speed


@dataclass(frozen=True, slots=True)
class Reading:
    """A stored record with its raw readings."""

    value: float
    samples: tuple[float, ...] = ()
    lower: float | None = None
    upper: float | None = None
    mode: str | None = None


@dataclass(frozen=True)
class TimingRatio:
    """b over a with bootstrap draws of it (float64 [draws], None where there are too few readings)."""

    value: float
    basis: str
    draws: Floats | None = None
    bounds: tuple[float, float] | None = None
    flags: tuple[str, ...] = ()

    def interval(self) -> tuple[float, float] | tuple[None, None]:
        if self.draws is not None:
            return percentile_interval(self.draws)
        return self.bounds or (None, None)


def timing_ratio(
    metric: str,
    a: Mapping[str, Reading],
    b: Mapping[str, Reading],
    *,
    a_is_baseline: bool = False,
    b_is_baseline: bool = False,
) -> TimingRatio:
    """The ratio b/a of a timed metric of two cells of one shape, on the best basis there is.

    Args:
        a, b: all records of the two cells, by metric.

    The speed-ups are baseline over variant, so a ratio of latencies is the inverse of a speed-up:
    ``t_b / t_a = (t_0 / t_a) / (t_0 / t_b)``.
    """
    record = SPEEDUPS.get(metric, "")
    fast_a = None if a_is_baseline else a.get(record)
    fast_b = None if b_is_baseline else b.get(record)
    if (a_is_baseline or fast_a) and (b_is_baseline or fast_b) and (fast_a or fast_b):
        return _by_rounds(record, fast_a, fast_b, a, b, metric)
    return across(metric, a, b)


def across(metric: str, a: Mapping[str, Reading], b: Mapping[str, Reading]) -> TimingRatio:
    """The ratio b/a of a metric of two cells that share no rounds: two sweeps, or two stores.

    Rounds against the baseline of each side are left alone, because a change that slows the baseline down
    as well would cancel out. A speed-up itself was taken in rounds, so a drift of the machine between the
    two sides is not in it.
    """
    grows = metric.endswith(_GROWING)
    # A control tells how fast the machine was, not how much memory was free.
    if CONTROL in a and CONTROL in b and (grows or metric.endswith(("_latency", "_kernel_time"))):
        return _by_control(metric, a, b, grows)
    found = _unpaired(metric, a[metric], b[metric])
    is_speedup = metric in SPEEDUPS.values() and found.draws is not None
    return replace(found, basis="speed-ups") if is_speedup else found


def _by_rounds(
    record: str,
    fast_a: Reading | None,
    fast_b: Reading | None,
    a: Mapping[str, Reading],
    b: Mapping[str, Reading],
    metric: str,
) -> TimingRatio:
    """By each side's rounds against the baseline; None is the baseline itself, always 1."""
    grows = metric.endswith(_GROWING)
    value = (1.0 if fast_b is None else fast_b.value) / (1.0 if fast_a is None else fast_a.value)
    sides = [(fast, cell) for fast, cell in ((fast_a, a), (fast_b, b)) if fast is not None]
    flags = [
        f"{record} timed as {base_mode(fast.mode)}, {metric} as {base_mode(cell[metric].mode)}"
        for fast, cell in sides
        if base_mode(fast.mode) != base_mode(cell[metric].mode)
    ]
    if len({base_mode(fast.mode) for fast, _ in sides}) > 1:
        flags.append(f"{record} of a and b timed in different modes")
    if drifted := _drift_flag(a, b):
        flags.append(f"{drifted}: trust the ratio, not the two times")
    draws = bounds = None
    if all(len(fast.samples) >= MIN_SAMPLES for fast, _ in sides):
        of_a = 1.0 if fast_a is None else _stretched(_draws(fast_a, record, "a"), fast_a)
        of_b = 1.0 if fast_b is None else _stretched(_draws(fast_b, record, "b"), fast_b)
        draws = np.asarray(of_b / of_a if grows else of_a / of_b, dtype=np.float64)
    elif len(sides) == 1 and (known := _bounds(sides[0][0])):
        inverted = (fast_b is None) == grows
        bounds = (1 / known[1], 1 / known[0]) if inverted else known
    basis = "paired quotient" if len(sides) == 2 else "paired"
    return TimingRatio(value if grows else 1 / value, basis, draws, bounds, tuple(flags))


def _by_control(metric: str, a: Mapping[str, Reading], b: Mapping[str, Reading], grows: bool) -> TimingRatio:
    """Each time in units of the control's: a machine that is 5 % slower slows both."""
    drift = b[CONTROL].value / a[CONTROL].value
    value = b[metric].value / a[metric].value * (drift if grows else 1 / drift)
    parts = [a[metric], b[metric], a[CONTROL], b[CONTROL]]
    flags = tuple(filter(None, [_drift_flag(a, b)]))
    if min(len(part.samples) for part in parts) < MIN_SAMPLES:
        return TimingRatio(value, "control", flags=flags)
    mine, theirs = _draws(a[metric], metric, "a"), _draws(b[metric], metric, "b")
    control = _draws(b[CONTROL], CONTROL, "b") / _draws(a[CONTROL], CONTROL, "a")
    draws = theirs / mine * (control if grows else 1 / control)
    return TimingRatio(value, "control", draws, flags=flags)


def _unpaired(metric: str, a: Reading, b: Reading) -> TimingRatio:
    value = b.value / a.value
    if min(len(a.samples), len(b.samples)) < MIN_SAMPLES:
        return TimingRatio(value, "reading")
    draws = _draws(b, metric, "b") / _draws(a, metric, "a")
    return TimingRatio(value, "unpaired", draws)


def _drift_flag(a: Mapping[str, Reading], b: Mapping[str, Reading]) -> str | None:
    if CONTROL not in a or CONTROL not in b:
        return None
    drift = b[CONTROL].value / a[CONTROL].value
    return f"beside b the control took {drift:.3g} times as long" if abs(drift - 1) > DRIFT else None


def _draws(reading: Reading, metric: str, side: str) -> Floats:
    return median_draws(reading.samples, generator(0, f"{side} {metric}"), DRAWS)


def _stretched(draws: Floats, reading: Reading) -> Floats:
    """Draws as wide as the stored interval where that is wider: it knows how many captures of a CUDA graph
    the rounds were of, which the readings alone do not say."""
    known, (lower, upper) = _bounds(reading), percentile_interval(draws)
    if known is None or not known[0] > 0:
        return draws
    logarithms = np.log(draws / reading.value)
    middle = float(np.median(logarithms))
    width, wanted = np.log(upper / lower), np.log(known[1] / known[0])
    if not width > 0 or wanted <= width:
        return draws
    stretched: Floats = reading.value * np.exp(middle + (logarithms - middle) * (wanted / width))
    return stretched


def _bounds(reading: Reading) -> tuple[float, float] | None:
    if reading.lower is None or reading.upper is None:
        return None
    return reading.lower, reading.upper
