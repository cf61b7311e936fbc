"""The values of columns, as SQL: of each variant the newest cell that measured it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from sqlalchemy import Connection, FromClause, ScalarSelect, select

from harness.store.catalogue import item_limits
from harness.store.frames import frame_of, typed
from harness.store.store import Store
from harness.store.tables import cells, records, variants

from .columns import Column
from .scope import Filters, chosen_cells, chunks, passing

__all__ = ["histories", "limits_for", "newest_of", "points", "values"]

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
    """The readings of these variants: one row a variant and column, with the column's name."""
    frames = []
    with store.reading() as connection:
        limits = limits_for(connection, columns)
        for column in columns:
            source = variants.join(records, records.c.id == newest_of(column, sweep, limits))
            query = select(
                variants.c.id.label("variant"),
                records.c.cell_id.label("cell"),
                cells.c.sweep_id.label("sweep"),
                records.c.id.label("record"),
                *(records.c[name] for name in _READ[4:]),
            ).select_from(source.join(cells, cells.c.id == records.c.cell_id))
            for part in chunks(variant_ids):
                found = frame_of(connection, query.where(variants.c.id.in_(part)))
                frames.append(found.assign(column=column.name))
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*_READ, "column"])
    return typed(frame, floats=("value", "lower", "upper"), integers=("variant", "cell", "sweep", "record"))


def points(store: Store, columns: Sequence[Column], filters: Filters, sweep: int | None) -> pd.DataFrame:
    """The variants that have all of the columns: variant, and for each column its reading as ``x``,
    ``x_lower``, ``x_upper``, then ``y`` ... and ``z`` ..."""
    with store.reading() as connection:
        limits = limits_for(connection, columns)
        source: FromClause = variants
        names = []
        for axis, column in zip("xyz", columns, strict=False):
            side = records.alias(axis)
            source = source.join(side, side.c.id == newest_of(column, sweep, limits))
            names += [side.c.value.label(axis), side.c.lower.label(f"{axis}_lower")]
            names += [side.c.upper.label(f"{axis}_upper")]
        query = (
            select(variants.c.id.label("variant"), *names)
            .select_from(source)
            .where(*passing(store, filters, sweep), *(name.element.is_not(None) for name in names[::3]))
            .order_by(variants.c.id)
        )
        frame = frame_of(connection, query)
    floats = [name for name in frame.columns if name != "variant"]
    return typed(frame, floats=floats, integers=("variant",))


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
