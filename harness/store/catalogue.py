"""What was measured of each model: kept beside the records, so that nobody has to read them all to know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, case, func, select, true
from sqlalchemy.dialects import postgresql, sqlite

from harness.evaluate.definitions import windows_in
from harness.records import CellKind
from harness.store.chunks import chunks
from harness.store.tables import catalogue, cells, records, sweeps, variants

__all__ = ["Entry", "add_to_catalogue", "item_limits", "measured_in"]


class Entry(NamedTuple):
    """A row of the catalogue: a metric of a model at a place. `item_limit` is 0 where there was none."""

    model: str
    kind: str
    place: str
    metric: str
    unit: str
    item_limit: int
    windows: str


def add_to_catalogue(connection: Connection, cell_ids: Iterable[int] | None) -> None:
    """Enter what the records of these cells are about, inside the transaction that wrote them.

    Once in a transaction: on a server another that enters the same waits for its end, so two that enter
    things in different orders would wait for each other.

    Args:
        cell_ids: None means all cells (after rows were inserted in bulk).
    """
    if cell_ids is None:
        _enter(connection, measured_in(connection, true()))
        return
    entries: set[Entry] = set()
    for chunk in chunks(sorted(set(cell_ids))):
        entries |= measured_in(connection, cells.c.id.in_(chunk))
    _enter(connection, entries)


def measured_in(connection: Connection, of_cells: ColumnElement[bool]) -> set[Entry]:
    """What the records of the cells are about, read from the records themselves."""
    is_task = cells.c.kind == str(CellKind.TASK)
    query = (
        select(
            variants.c.model,
            cells.c.kind,
            func.coalesce(cells.c.task, cells.c.scenario, cells.c.kind).label("place"),
            records.c.metric,
            records.c.unit,
            # Only a task is cut short, so other cells need not be told apart by their sweeps.
            case((is_task, cells.c.sweep_id), else_=None).label("sweep"),
            case((is_task & records.c.note.contains("seq_len="), records.c.note), else_=None).label("note"),
        )
        .select_from(cells)
        .join(records, records.c.cell_id == cells.c.id)
        .join(variants, variants.c.id == cells.c.variant_id)
        .where(of_cells)
        .distinct()
    )
    found = connection.execute(query).all()
    limits = item_limits(connection, {row.sweep for row in found if row.sweep is not None})
    return {
        Entry(
            row.model,
            row.kind,
            row.place,
            row.metric,
            row.unit,
            limits.get(row.sweep, 0),
            windows_in(row.note),
        )
        for row in found
    }


def item_limits(connection: Connection, sweep_ids: Iterable[int] | None = None) -> dict[int, int]:
    """The limit on a task's items of each sweep (of these, or of all) that had one."""
    query = select(sweeps.c.id, sweeps.c.config)
    if sweep_ids is not None:
        query = query.where(sweeps.c.id.in_(sorted(set(sweep_ids))))
    limits = ((sweep, (config or {}).get("limit")) for sweep, config in connection.execute(query))
    return {sweep: int(limit) for sweep, limit in limits if limit is not None}


def _enter(connection: Connection, entries: set[Entry]) -> None:
    if not entries:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    # Two sweeps on a server may enter the same at the same time.
    statement = dialect.insert(catalogue).on_conflict_do_nothing()
    connection.execute(statement, [entry._asdict() for entry in sorted(entries)])
