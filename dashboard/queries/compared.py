"""Variants against another one, by the comparisons of `harness.comparing`: paired where that is possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from sqlalchemy import select

from harness.comparing import Comparison, Reading, adjusted
from harness.comparing.cells import Cell
from harness.comparing.methods import compare_cells, ratio_verdict
from harness.conditions import read_conditions
from harness.display import COUNTED, better
from harness.evaluate.intervals import sum_of_independent
from harness.store.chunks import chunks
from harness.store.readings import all_readings
from harness.store.store import Store
from harness.store.tables import cells, imports, records, variants

from .columns import Column

__all__ = ["DIFFERENCES", "cells_at", "differences", "independent_interval", "with_interval"]

DIFFERENCES = (
    "variant", "column", "metric", "place", "unit", "direction", "baseline", "value", "difference", "ratio",
    "is_ratio", "lower", "upper", "p", "test", "detectable", "n", "flips", "basis", "verdict", "caution",
)  # fmt: skip

_NUMBERS = ("baseline", "value", "difference", "ratio", "lower", "upper", "p", "detectable")


def cells_at(store: Store, cell_ids: Iterable[int]) -> dict[int, Cell]:
    """Cells with their finite records, readings and conditions, by id, ready to be compared with any other.

    Variants of two models, seeds or files can be put side by side; what differs between them is said as a
    caution.
    """
    wanted = sorted(set(cell_ids))
    about = select(
        cells.c.id.label("cell"), cells.c.variant_id.label("variant"), cells.c.sweep_id.label("sweep"),
        cells.c.kind, cells.c.task, cells.c.scenario, cells.c.status, cells.c.reason,
        variants.c.method, variants.c.family, variants.c.model, variants.c.seed, variants.c.dtype,
        variants.c.device_name, imports.c.origin,
    ).join(variants, variants.c.id == cells.c.variant_id)  # fmt: skip
    about = about.outerjoin(imports, imports.c.sweep_id == cells.c.sweep_id)
    names = ("cell_id", "metric", "value", "unit", "lower", "upper", "mode")
    measured = select(*(records.c[name] for name in names)).where(records.c.value.is_not(None))
    samples, conditions = all_readings(store, wanted), read_conditions(store, wanted)
    found: dict[int, Cell] = {}
    with store.reading() as connection:
        for part in chunks(wanted):
            for row in connection.execute(about.where(cells.c.id.in_(part))).mappings():
                cell = found[row["cell"]] = Cell(store, [{**row, "options": {}}], (row["cell"],))
                cell.origin = None  # among the marks and the cautions
                cell.conditions = conditions[cell.id]
            ordered = measured.where(records.c.cell_id.in_(part)).order_by(records.c.id)
            for id_, metric, value, unit, lower, upper, mode in connection.execute(ordered):
                if not math.isfinite(value):
                    continue
                reading = Reading(value, samples.get((id_, metric), ()), lower, upper, mode)
                found[id_].records[metric], found[id_].units[metric] = reading, unit
    return found


def differences(
    store: Store,
    columns: Sequence[Column],
    readings: pd.DataFrame,
    pairs: Mapping[int, int],
    about: pd.DataFrame,
) -> pd.DataFrame:
    """Each variant against the one that it is paired with, one row for each column that both have a finite
    value of.

    P-values are adjusted over all rows that are returned. Times and sizes have a `ratio` with its interval,
    scores a `difference` with its interval, in the unit that was stored.

    Args:
        readings: rows of `values` of both sides.
        pairs: variant to what it is compared with.
        about: rows of `described` of both sides.
    """
    by_place = {
        (variant, column): cell
        for variant, column, cell in zip(
            readings["variant"], readings["column"], readings["cell"], strict=True
        )
    }
    wanted = [
        (variant, column, by_place[base, column.name], by_place[variant, column.name])
        for variant, base in pairs.items()
        for column in columns
        if (base, column.name) in by_place and (variant, column.name) in by_place
    ]
    ids = {cell for *_, a, b in wanted for cell in (a, b)}
    stored = cells_at(store, ids)
    rows: list[tuple[int, Column, Comparison, tuple[Reading, Reading]]] = []
    for variant, column, a, b in wanted:
        for row in compare_cells(stored[a], stored[b], [column.metric]):
            sides = stored[a].records[column.metric], stored[b].records[column.metric]
            rows.append((variant, column, row, sides))
    known = about.set_index("variant")
    tested = adjusted([with_interval(row, readings_of) for *_, row, readings_of in rows])
    return pd.DataFrame(
        [
            _row(variant, column, row, _cautions(known.loc[pairs[variant]], known.loc[variant]))
            for (variant, column, *_), row in zip(rows, tested, strict=True)
        ],
        columns=list(DIFFERENCES),
    ).astype(dict.fromkeys(_NUMBERS, "float64"))


def with_interval(row: Comparison, readings: tuple[Reading, Reading]) -> Comparison:
    """The comparison; where it has no interval, with one from the two readings' own intervals.

    As if the two were independent (MOVER: Zou and Donner 2008, Statistics in Medicine 27), which is cautious.
    Ratios are combined on the logarithmic scale. What is counted and not sampled differs by exactly what it
    differs by.
    """
    if row.lower is not None:
        return row
    if row.metric in COUNTED:
        value = row.difference if row.ratio is None else row.ratio
        return _judged(replace(row, lower=value, upper=value, basis="counted"))
    sides = [(side.lower, side.value, side.upper) for side in readings]
    if any(part is None for side in sides for part in side):
        return row
    if row.ratio is None:
        lower, upper = independent_interval(*sides)
    elif min(side[0] for side in sides) > 0:
        logarithms = [tuple(map(math.log, side)) for side in sides]
        lower, upper = map(math.exp, independent_interval(*logarithms))
    else:
        return row
    return _judged(replace(row, lower=lower, upper=upper, basis="intervals"))


def independent_interval(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float]:
    """The interval of the difference ``b - a`` of two independent readings, each lower, value, upper."""
    (a_lower, a_value, a_upper), (b_lower, b_value, b_upper) = a, b
    _, lower, upper = sum_of_independent(
        [(b_value, b_lower, b_upper, 1.0), (a_value, a_lower, a_upper, -1.0)]
    )
    return lower, upper


def _judged(row: Comparison) -> Comparison:
    return row if row.ratio is None else replace(row, verdict=ratio_verdict(row))


def _cautions(base: pd.Series, variant: pd.Series) -> list[str]:
    """What the labels of two variants say against comparing them."""
    return [
        f"{label}: {base[name]} and {variant[name]}"
        for name, label in (("model", "model"), ("seed", "seed"), ("origin", "origin"))
        if base[name] != variant[name]
    ]


def _row(variant: int, column: Column, row: Comparison, cautions: Sequence[str]) -> dict[str, Any]:
    said = [*cautions, *(f"not comparable, {each}" for each in row.differences), *row.flags]
    if row.sweep_a != row.sweep_b:
        said.append("measured in different sweeps")
    return {
        "variant": variant,
        "column": column.name,
        "metric": column.metric,
        "place": column.place,
        "unit": column.unit,
        "direction": better(column.metric, column.unit, column.kind),
        "baseline": row.a,
        "value": row.b,
        "difference": row.b - row.a if row.difference is None else row.difference,
        "ratio": row.ratio if row.ratio is not None else (row.b / row.a if row.a else None),
        "is_ratio": row.ratio is not None,
        "lower": row.lower,
        "upper": row.upper,
        "p": row.p,
        "test": row.test or "",
        "detectable": row.detectable,
        "n": row.n,
        "flips": row.flips,
        "basis": row.basis or "",
        "verdict": row.verdict,
        "caution": "; ".join(said),
    }
