"""The size at which two variants cost the same, from the cells of both. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from harness.comparability import Conditions, Difference, Scope, differences
from harness.comparing.cells import Cell
from harness.comparing.growth import Axis, shape_of
from harness.comparing.matching import pairs_of
from harness.comparing.ratios import TimingRatio, across, timing_ratio
from harness.evaluate.intervals import generator
from harness.scaling import BreakEven, Point, break_even

__all__ = ["TIMES", "Crossing", "crossings", "crossings_in_words"]

TIMES = ("prefill_latency", "decode_latency", "end_to_end_latency")
_NAMES = {Axis.PROMPT_LEN: "prompt length", Axis.BATCH_SIZE: "batch size"}


@dataclass(frozen=True)
class Crossing:
    """One crossing, or its absence, of one metric of two variants along one axis, on one device.

    `fixed` is the batch size where prompt lengths vary, and the prompt length where batch sizes do.
    `ratios` are the measured b/a by size (below 1: b is faster) with their `intervals` (95 %, None where
    there are too few readings), and `bases` what each rests on.
    """

    axis: Axis
    model: str
    seed: int
    dtype: str
    device: str
    fixed: int
    new_tokens: int
    metric: str
    found: BreakEven
    ratios: dict[int, float]
    intervals: dict[int, tuple[float, float] | tuple[None, None]]
    bases: dict[int, str]
    flags: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()


def crossings_in_words(
    found: BreakEven,
    ratios: Mapping[int, float],
    b: str,
    axis: Axis = Axis.BATCH_SIZE,
    intervals: Mapping[int, tuple[float, float] | tuple[None, None]] | None = None,
) -> str:
    """Where b is the faster one, and where the intervals of the ratios do not show it."""
    size = _NAMES[axis]
    if found.outcome == "crosses":
        side = "below" if found.better_below else "above"
        if (found.lower, found.upper) == (-math.inf, math.inf):
            return f"not clear: {b} is faster {side} it, if it is there at all"
        return f"{b} is faster {side} it"
    sizes = f"{found.smallest:g} to {found.largest:g}"
    where = f"at every measured {size} ({sizes})"
    if all(ratio == 1 for ratio in ratios.values()):
        return f"equally fast {where}"
    unclear = [
        at for at, (lower, upper) in (intervals or {}).items()
        if lower is not None and upper is not None and lower <= 1 <= upper
    ]  # fmt: skip
    if len(unclear) == len(ratios):
        return f"no clear difference at any measured {size} ({sizes})"
    doubt = f", not clearly at {', '.join(map(str, sorted(unclear)))}" if unclear else ""
    return f"{b} is {'faster' if max(ratios.values()) <= 1 else 'slower'} {where}{doubt}"


def crossings(mine: Sequence[Cell], theirs: Sequence[Cell], axis: Axis) -> list[Crossing]:
    """Where b (`theirs`) stops or starts being faster than a (`mine`), for everything that was held.

    Empty where no two sizes were timed of both.

    Args:
        mine, theirs: cells that each have a shape for their label.
    """
    series: dict[_Series, list[_Measured]] = {}
    for key, measured in _ratios(mine, theirs, axis):
        series.setdefault(key, []).append(measured)
    rows = []
    for key, found in series.items():
        if len(found) >= 2:
            rows += _rows(key, sorted(found, key=lambda each: each.size), axis)
    return rows


class _Series(NamedTuple):
    """What the sizes of one line have in common."""

    model: str
    seed: int
    dtype: str
    device: str
    fixed: int
    new_tokens: int
    metric: str


class _Measured(NamedTuple):
    """The ratio at one size."""

    size: int
    ratio: TimingRatio
    conditions: Conditions
    differences: tuple[Difference, ...]
    passed_over: str | None


def _ratios(mine: Sequence[Cell], theirs: Sequence[Cell], axis: Axis) -> Iterator[tuple[_Series, _Measured]]:
    for place in dict.fromkeys(cell.place for cell in (*mine, *theirs)):
        shape = shape_of(str(place[4]))
        assert shape is not None
        for metric in TIMES:
            of_a, of_b = (
                [cell for cell in side if cell.place == place and metric in cell.records]
                for side in (mine, theirs)
            )
            if not (of_a and of_b):
                continue
            for first, second, found, passed in pairs_of(of_a, of_b, Scope.TIMING, metric):
                ratio = _ratio(metric, first, second)
                setting = str(second.dtype), str(second.device)
                series = _Series(str(place[0]), int(place[1]), *setting, *axis.fixed(shape), metric)
                size = axis.size(shape)
                yield series, _Measured(size, _by_itself(ratio, size), second.conditions, found, passed)


def _by_itself(ratio: TimingRatio, size: int) -> TimingRatio:
    """The ratio with its draws in an order of their own: those of all sizes were made with the same random
    numbers, and where readings drift would rise and fall together."""
    if ratio.draws is None:
        return ratio
    return replace(ratio, draws=generator(0, f"size {size}").permutation(ratio.draws))


def _ratio(metric: str, a: Cell, b: Cell) -> TimingRatio:
    if a.setting != b.setting:
        return across(metric, a.records, b.records)
    return timing_ratio(
        metric, a.records, b.records, a_is_baseline=a.is_baseline, b_is_baseline=b.is_baseline
    )


def _rows(key: _Series, measured: Sequence[_Measured], axis: Axis) -> list[Crossing]:
    mark = "p" if axis is Axis.PROMPT_LEN else "b"
    flags = [
        f"{mark}{each.size}: {flag}"
        for each in measured
        for flag in (*each.ratio.flags, *filter(None, [each.passed_over]), *_apart(each, measured[-1]))
    ]
    points = [Point(each.size, each.ratio.value, each.ratio.draws) for each in measured]
    return [
        Crossing(
            axis=axis,
            model=key.model,
            seed=key.seed,
            dtype=key.dtype,
            device=key.device,
            fixed=key.fixed,
            new_tokens=key.new_tokens,
            metric=key.metric,
            found=found,
            ratios={each.size: each.ratio.value for each in measured},
            intervals={each.size: each.ratio.interval() for each in measured},
            bases={each.size: each.ratio.basis for each in measured},
            flags=tuple(flags),
            differences=tuple(dict.fromkeys(d for each in measured for d in each.differences)),
        )
        for found in break_even(points)
    ]


def _apart(one: _Measured, last: _Measured) -> list[str]:
    """Where a size was measured under other conditions than the largest one, which each ratio by itself
    does not show."""
    found = differences(one.conditions, last.conditions, Scope.TIMING)
    return [f"{each} at {last.size}" for each in found if not each.is_passing]
