"""The values of columns, as SQL: of each variant the newest cell that measured it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from sqlalchemy import Connection, FromClause, ScalarSelect, func, select

from harness.evaluate.definitions import windows_in
from harness.store.catalogue import item_limits
from harness.store.chunks import chunks
from harness.store.frames import frame_of, typed
from harness.store.store import Store
from harness.store.tables import cells, records, variants

from .columns import Column
from .scope import Filters, chosen_cells, passing

__all__ = ["everything", "histories", "limits_for", "newest_of", "points", "sweeps_of", "values"]

_MEASURED = tuple(records.c[name] for name in ("value", "lower", "upper", "n", "mode"))
_READ = ("variant", "cell", "sweep", "record", "value", "lower", "upper", "n", "mode")


def newest_of(column: Column, sweep: int | None, limits: dict[int, int]) -> ScalarSelect[int]:
    """The record of the variant at hand, for a query over `variants`: where two cells measured the same under
    different settings, the newer one's.

    A look-up for each variant, because a join with all readings at a place would be done without an index.

    Args:
        limits: `harness.store.catalogue.item_limits`.
    """
    return (
        select(records.c.id)
        .select_from(cells.join(records, records.c.cell_id == cells.c.id))
        .where(cells.c.variant_id == variants.c.id)
        .where(column.of_cells(), column.of_records(limits), chosen_cells(sweep))
        .order_by(cells.c.id.desc(), records.c.id.desc())
        .limit(1)
        .correlate(variants)
        .scalar_subquery()
    )


def values(
    store: Store, columns: Sequence[Column], sweep: int | None, variant_ids: Sequence[int]
) -> pd.DataFrame:
    """The readings of these variants: one row a variant and column, with the column's name.

    A query for each column, so that nothing else is read; `everything` is faster for many columns.
    """
    rows: list[tuple[Any, ...]] = []
    with store.reading() as connection:
        limits = limits_for(connection, columns)
        for column in columns:
            source = variants.join(records, records.c.id == newest_of(column, sweep, limits))
            query = select(variants.c.id, cells.c.id, cells.c.sweep_id, records.c.id, *_MEASURED)
            query = query.select_from(source.join(cells, cells.c.id == records.c.cell_id))
            for part in chunks(variant_ids):
                found = connection.execute(query.where(variants.c.id.in_(part)))
                rows += [(*row, column.name) for row in found]
    return _frame(rows)


def everything(
    store: Store, columns: Sequence[Column], sweep: int | None, variant_ids: Sequence[int]
) -> pd.DataFrame:
    """As `values`, of a few variants in one query that reads all of their records."""
    of_place: dict[tuple[str, str, str], list[Column]] = {}
    for column in columns:
        of_place.setdefault((column.kind, column.place, column.metric), []).append(column)
    place = func.coalesce(cells.c.task, cells.c.scenario, cells.c.kind)
    query = (
        select(
            cells.c.kind, place, records.c.metric, records.c.note,
            cells.c.variant_id, cells.c.id, cells.c.sweep_id, records.c.id, *_MEASURED,
        )
        .select_from(cells.join(records, records.c.cell_id == cells.c.id))
        .where(cells.c.variant_id.in_(list(variant_ids)), chosen_cells(sweep))
        .order_by(cells.c.id, records.c.id)
    )  # fmt: skip
    newest: dict[tuple[int, str], tuple[Any, ...]] = {}
    with store.reading() as connection:
        limits = limits_for(connection, columns)
        for kind, where, metric, note, *reading in connection.execute(query):
            for column in of_place.get((kind, where, metric), ()):
                meaning = limits.get(reading[2], 0), windows_in(note)
                if column.meanings is None or meaning in column.meanings:
                    newest[reading[0], column.name] = (*reading, column.name)
    return _frame(list(newest.values()))


def _frame(rows: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=[*_READ, "column"], dtype=object)
    return typed(frame, floats=("value", "lower", "upper"), integers=("variant", "cell", "sweep", "record"))


def points(store: Store, columns: Sequence[Column], filters: Filters, sweep: int | None) -> pd.DataFrame:
    """The variants that have all of the columns: variant, and for each column its reading as ``x``,
    ``x_lower``, ``x_upper`` and the cell that holds it as ``x_cell``, then ``y`` ... and ``z`` ..."""
    with store.reading() as connection:
        limits = limits_for(connection, columns)
        source: FromClause = variants
        names = []
        for axis, column in zip("xyz", columns, strict=False):
            side = records.alias(axis)
            source = source.join(side, side.c.id == newest_of(column, sweep, limits))
            names += [side.c.value.label(axis), side.c.lower.label(f"{axis}_lower")]
            names += [side.c.upper.label(f"{axis}_upper"), side.c.cell_id.label(f"{axis}_cell")]
        query = (
            select(variants.c.id.label("variant"), *names)
            .select_from(source)
            .where(*passing(store, filters, sweep), *(name.element.is_not(None) for name in names[::4]))
            .order_by(variants.c.id)
        )
        frame = frame_of(connection, query)
    integers = ["variant", *(name for name in frame.columns if name.endswith("_cell"))]
    return typed(frame, floats=[name for name in frame.columns if name not in integers], integers=integers)


def sweeps_of(store: Store, cell_ids: Iterable[int]) -> list[int]:
    """The sweeps that measured these cells."""
    found: set[int] = set()
    query = select(cells.c.sweep_id).distinct()
    with store.reading() as connection:
        for part in chunks(sorted({int(cell) for cell in cell_ids})):
            found |= set(connection.scalars(query.where(cells.c.id.in_(part))))
    return sorted(found)


def limits_for(connection: Connection, columns: Iterable[Column]) -> dict[int, int]:
    """The limits of sweeps, where any of the columns asks for them."""
    return item_limits(connection) if any(column.meanings for column in columns) else {}


def histories(store: Store, column: Column, variant_ids: Sequence[int]) -> dict[int, list[float]]:
    """Every value that was ever measured of a column, oldest first, by variant; superseded cells too."""
    with store.reading() as connection:
        limits = limits_for(connection, [column])
        query = (
            select(cells.c.variant_id, records.c.value)
            .join(records, records.c.cell_id == cells.c.id)
            .where(column.of_cells(), column.of_records(limits), records.c.value.is_not(None))
            .order_by(cells.c.variant_id, cells.c.id)
        )
        found: dict[int, list[float]] = {}
        for part in chunks(variant_ids):
            for variant, value in connection.execute(query.where(cells.c.variant_id.in_(part))):
                found.setdefault(variant, []).append(value)
    return found
