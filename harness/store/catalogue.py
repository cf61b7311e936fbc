"""What was measured of each model: kept beside the records, so that nobody has to read them all to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Select, case, func, select
from sqlalchemy.dialects import postgresql, sqlite

from harness.evaluate.definitions import windows_in
from harness.records import CellKind
from harness.store.tables import catalogue, cells, records, sweeps, variants

__all__ = ["add_to_catalogue", "item_limits"]

_CHUNK = 10_000  # parameters of one statement


def add_to_catalogue(connection: Connection, cell_ids: Iterable[int] | None) -> None:
    """Enter what the records of these cells are about, inside the transaction that wrote them.

    Args:
        cell_ids: None means all cells (after rows were inserted in bulk).
    """
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
        .distinct()
    )
    if cell_ids is None:
        _add(connection, query)
        return
    wanted = sorted(set(cell_ids))
    for start in range(0, len(wanted), _CHUNK):
        _add(connection, query.where(cells.c.id.in_(wanted[start : start + _CHUNK])))


def item_limits(connection: Connection, sweep_ids: Iterable[int] | None = None) -> dict[int, int]:
    """The limit on a task's items of each sweep (of these, or of all) that had one."""
    query = select(sweeps.c.id, sweeps.c.config)
    if sweep_ids is not None:
        query = query.where(sweeps.c.id.in_(sorted(set(sweep_ids))))
    limits = ((sweep, (config or {}).get("limit")) for sweep, config in connection.execute(query))
    return {sweep: int(limit) for sweep, limit in limits if limit is not None}


def _add(connection: Connection, query: Select[Any]) -> None:
    found = connection.execute(query).all()
    if not found:
        return
    limits = item_limits(connection, {row.sweep for row in found if row.sweep is not None})
    rows = {_entry(row, limits) for row in found}
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    names = [column.name for column in catalogue.c]
    values = [dict(zip(names, row, strict=True)) for row in sorted(rows)]
    # Two sweeps on a server may enter the same at the same time.
    connection.execute(dialect.insert(catalogue).on_conflict_do_nothing(), values)


def _entry(row: Any, limits: Mapping[int, int]) -> tuple[str, str, str, str, str, int, str]:
    limit = limits.get(row.sweep, 0)
    return row.model, row.kind, row.place, row.metric, row.unit, limit, windows_in(row.note)
