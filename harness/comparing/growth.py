"""How a cost of one variant grows with the prompt or with the batch, from its cells. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from harness.comparability import Conditions, base_mode, differences, scope_of
from harness.comparing.cells import Cell
from harness.comparing.ratios import CONTROL, DRAWS, MIN_SAMPLES, Reading
from harness.evaluate.intervals import Floats, generator
from harness.measure.statistics import median_draws
from harness.scaling import Exponent, Point, length_exponent

__all__ = ["MIN_SIZES", "Axis", "Growth", "Shape", "growths", "shape_of"]

MIN_SIZES = 3
"""Below this an exponent says nothing about whether the points lie on a line."""

_SHAPE = re.compile(r"^b(\d+)-p(\d+)-g(\d+)$")

Shape = tuple[int, int, int]
"""Batch size, prompt length and new tokens."""


def shape_of(label: str) -> Shape | None:
    """Batch size, prompt length and new tokens of a scenario's label; None for anything else.

    >>> shape_of("b8-p512-g64"), shape_of("transform")
    ((8, 512, 64), None)
    """
    match = _SHAPE.match(label)
    if match is None:
        return None
    batch, prompt, new = (int(part) for part in match.groups())
    return batch, prompt, new


class Axis(StrEnum):
    """What a cost grows with."""

    PROMPT_LEN = "prompt_len"
    BATCH_SIZE = "batch_size"

    def size(self, shape: Shape) -> int:
        """What varies along the axis."""
        return shape[1] if self is Axis.PROMPT_LEN else shape[0]

    def fixed(self, shape: Shape) -> tuple[int, int]:
        """What is held: the batch size or the prompt length, and the new tokens."""
        return (shape[0] if self is Axis.PROMPT_LEN else shape[1]), shape[2]


@dataclass(frozen=True)
class Growth:
    """One metric of one variant over the sizes of an axis, taken in one way.

    `fixed` is the batch size where prompt lengths vary, and the prompt length where batch sizes do.
    `values` are as measured, in `unit`, with the stored `intervals` (95 %, None where there is none). `basis`
    says what the exponent rests on: ``control`` (each time over that of a fixed workload timed next to it),
    ``unpaired`` or ``reading``. `exponent` is None where fewer than three sizes can be put in one line;
    `note` says which sizes are not in it, and why.
    """

    axis: Axis
    fixed: int
    new_tokens: int
    metric: str
    mode: str | None
    unit: str
    values: dict[int, float]
    intervals: dict[int, tuple[float | None, float | None]]
    exponent: Exponent | None
    basis: str
    note: str = ""


def growths(
    cells: Sequence[Cell],
    axis: Axis,
    metrics: Sequence[str],
    fewest: int = MIN_SIZES,
) -> Iterator[Growth]:
    """The lines of one variant's timed cells: by what is held, then by metric.

    Only cells that may be compared are put in one line: taken in the same mode, on the same device, with
    the same versions and clocks.

    Args:
        cells: all of one variant, each with a shape for its label.
        fewest: sizes that a metric must have been measured at.
    """
    shapes = {cell.id: _shape(cell) for cell in cells}
    for fixed, new in dict.fromkeys(axis.fixed(shapes[cell.id]) for cell in cells):
        mine = [cell for cell in cells if axis.fixed(shapes[cell.id]) == (fixed, new)]
        for metric in metrics:
            lines: list[_Line] = []
            for cell in sorted(mine, key=lambda cell: cell.id):
                if metric in cell.records and cell.records[metric].value > 0:
                    _put(lines, axis.size(shapes[cell.id]), cell, metric)
            sizes = {size for line in lines for size in line.cells}
            if len(sizes) < fewest:
                continue
            for line in [line for line in lines if len(line.cells) >= MIN_SIZES] or lines:
                basis, points = _points(line, metric)
                ordered = {size: line.cells[size].records[metric] for size in sorted(line.cells)}
                yield Growth(
                    axis=axis, fixed=fixed, new_tokens=new, metric=metric, mode=line.mode,
                    unit=next(iter(line.cells.values())).units[metric],
                    values={size: record.value for size, record in ordered.items()},
                    intervals={size: (record.lower, record.upper) for size, record in ordered.items()},
                    exponent=length_exponent(points) if len(points) >= MIN_SIZES else None, basis=basis,
                    note=_note(line, lines),
                )  # fmt: skip


@dataclass
class _Line:
    """Cells by size that may be put in one line."""

    mode: str | None
    conditions: Conditions
    cells: dict[int, Cell]


def _shape(cell: Cell) -> Shape:
    shape = shape_of(cell.label)
    assert shape is not None
    return shape


def _put(lines: list[_Line], size: int, cell: Cell, metric: str) -> None:
    """Add a cell to the line it belongs to; of one size the newest is kept."""
    mode, about = base_mode(cell.records[metric].mode), cell.conditions
    scope = scope_of(cell.kind, cell.units[metric], metric)
    for line in lines:
        alike = line.mode == mode and next(iter(line.cells.values())).origin == cell.origin
        if alike and not differences(line.conditions, about, scope):
            line.cells[size] = cell
            return
    lines.append(_Line(mode, about, {size: cell}))


def _points(line: _Line, metric: str) -> tuple[str, list[Point]]:
    """The points of a line. Times are taken in units of a control's that was timed next to each, where
    every cell has one: the sizes were not timed at one moment."""
    cells = line.cells.items()
    is_time = metric.endswith("_latency")
    if is_time and all(CONTROL in cell.records for _, cell in cells):
        return "control", [_controlled(size, cell, metric) for size, cell in cells]
    basis = "unpaired" if is_time else "reading"
    return basis, [
        Point(size, cell.records[metric].value, _draws(cell.records[metric], f"{metric} {size}"))
        for size, cell in cells
    ]


def _controlled(size: int, cell: Cell, metric: str) -> Point:
    reading, control = cell.records[metric], cell.records[CONTROL]
    of_reading, of_control = _draws(reading, f"{metric} {size}"), _draws(control, f"{CONTROL} {size}")
    draws = None if of_reading is None or of_control is None else of_reading / of_control
    return Point(size, reading.value / control.value, draws)


def _draws(reading: Reading, name: str) -> Floats | None:
    if len(reading.samples) < MIN_SAMPLES:
        return None
    return median_draws(reading.samples, generator(0, name), DRAWS)


def _note(line: _Line, lines: Sequence[_Line]) -> str:
    """Which sizes are not in this line, and why."""
    why: dict[str, set[int]] = {}
    for other in lines:
        if sizes := other.cells.keys() - line.cells.keys():
            is_same_mode = other.mode == line.mode
            reason = "measured under other conditions" if is_same_mode else f"taken as {other.mode}"
            why.setdefault(reason, set()).update(sizes)
    return "; ".join(
        f"without {', '.join(map(str, sorted(sizes)))}: {reason}" for reason, sizes in why.items()
    )
