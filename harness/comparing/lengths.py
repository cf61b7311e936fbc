"""How each variant's time and memory grow with the prompt, from its stored cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.comparability import Conditions, base_mode, differences, scope_of
from harness.comparing.break_even import shape_of
from harness.comparing.cells import Cell, cells_of
from harness.comparing.ratios import CONTROL, DRAWS, MIN_SAMPLES, Reading
from harness.errors import ConfigError
from harness.evaluate.intervals import Floats, generator
from harness.measure.statistics import median_draws
from harness.scaling import Exponent, Point, length_exponent
from harness.store.store import Store

__all__ = ["LengthSweep", "length_sweeps"]

MIN_LENGTHS = 3
_METRICS = (
    "prefill_latency",
    "decode_latency",
    "end_to_end_latency",
    "prefill_peak_bytes",
    "prefill_activation_bytes",
    "prefill_kv_cache_bytes",
)


@dataclass(frozen=True)
class LengthSweep:
    """One metric of one variant over prompt lengths, at one batch size, taken in one way.

    `values` are as measured. `basis` says what the exponent rests on: ``control`` (each time over that of
    a fixed workload timed next to it), ``unpaired`` or ``reading``. `exponent` is None where fewer than
    three lengths can be put in one line; `note` then says why.
    """

    model: str
    method: str
    seed: int
    dtype: str
    device: str
    metric: str
    batch_size: int
    new_tokens: int
    mode: str | None
    values: dict[int, float]
    exponent: Exponent | None
    basis: str
    note: str = ""


def length_sweeps(
    store: Store, models: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> list[LengthSweep]:
    """The exponents of every variant that was timed at three prompt lengths or more.

    Only cells that may be compared are put in one line: taken in the same mode, on the same device, with
    the same versions and clocks.

    Raises:
        ConfigError: nothing was timed at three prompt lengths.
    """
    cells = [
        cell
        for cell in cells_of(store, models)
        if shape_of(cell.label) is not None and (methods is None or cell.method in methods)
    ]
    rows = [row for key in dict.fromkeys(map(_variant, cells)) for row in _rows(key, cells)]
    if not rows:
        raise ConfigError(
            f"nothing in this store was timed at {MIN_LENGTHS} prompt lengths: "
            "sweep with --prompt-lens 128,512,2048"
        )
    return rows


_Key = tuple[str, str, int, str, str, int, int]


def _variant(cell: Cell) -> _Key:
    shape = shape_of(cell.label)
    assert shape is not None
    batch, _, new = shape
    model, seed = str(cell.place[0]), int(cell.place[1])
    return model, cell.method, seed, str(cell.dtype), str(cell.device), batch, new


def _rows(key: _Key, cells: Sequence[Cell]) -> Iterator[LengthSweep]:
    model, method, seed, dtype, device, batch, new = key
    mine = [cell for cell in cells if _variant(cell) == key]
    for metric in _METRICS:
        lines: list[_Line] = []
        for cell in sorted(mine, key=lambda cell: cell.id):
            if metric in cell.records and cell.records[metric].value > 0:
                _put(lines, cell, metric)
        lengths = {length for line in lines for length in line.cells}
        if len(lengths) < MIN_LENGTHS:
            continue
        for line in [line for line in lines if len(line.cells) >= MIN_LENGTHS] or lines:
            basis, points = _points(line, metric)
            yield LengthSweep(
                model=model, method=method, seed=seed, dtype=dtype, device=device, metric=metric,
                batch_size=batch, new_tokens=new, mode=line.mode,
                values={length: line.cells[length].records[metric].value for length in sorted(line.cells)},
                exponent=length_exponent(points) if len(points) >= MIN_LENGTHS else None, basis=basis,
                note=_note(line, lines),
            )  # fmt: skip


@dataclass
class _Line:
    """Cells by prompt length that may be put in one line."""

    mode: str | None
    conditions: Conditions
    cells: dict[int, Cell]


def _put(lines: list[_Line], cell: Cell, metric: str) -> None:
    """Add a cell to the line it belongs to; of one length the newest is kept."""
    shape = shape_of(cell.label)
    assert shape is not None
    mode, about = base_mode(cell.records[metric].mode), cell.conditions
    scope = scope_of(cell.kind, cell.units[metric], metric)
    for line in lines:
        alike = line.mode == mode and next(iter(line.cells.values())).origin == cell.origin
        if alike and not differences(line.conditions, about, scope):
            line.cells[shape[1]] = cell
            return
    lines.append(_Line(mode, about, {shape[1]: cell}))


def _points(line: _Line, metric: str) -> tuple[str, list[Point]]:
    """The points of a line. Times are taken in units of a control's that was timed next to each, where
    every cell has one: the lengths were not timed at one moment."""
    cells = line.cells.items()
    is_time = metric.endswith("_latency")
    if is_time and all(CONTROL in cell.records for _, cell in cells):
        return "control", [_controlled(length, cell, metric) for length, cell in cells]
    basis = "unpaired" if is_time else "reading"
    return basis, [
        Point(length, cell.records[metric].value, _draws(cell.records[metric], f"{metric} {length}"))
        for length, cell in cells
    ]


def _controlled(length: int, cell: Cell, metric: str) -> Point:
    reading, control = cell.records[metric], cell.records[CONTROL]
    of_reading, of_control = _draws(reading, f"{metric} {length}"), _draws(control, f"{CONTROL} {length}")
    draws = None if of_reading is None or of_control is None else of_reading / of_control
    return Point(length, reading.value / control.value, draws)


def _draws(reading: Reading, name: str) -> Floats | None:
    if len(reading.samples) < MIN_SAMPLES:
        return None
    return median_draws(reading.samples, generator(0, name), DRAWS)


def _note(line: _Line, lines: Sequence[_Line]) -> str:
    """Which lengths are not in this line, and why."""
    why: dict[str, set[int]] = {}
    for other in lines:
        if lengths := other.cells.keys() - line.cells.keys():
            is_same_mode = other.mode == line.mode
            reason = "measured under other conditions" if is_same_mode else f"taken as {other.mode}"
            why.setdefault(reason, set()).update(lengths)
    return "; ".join(
        f"without {', '.join(map(str, sorted(lengths)))}: {reason}" for reason, lengths in why.items()
    )
