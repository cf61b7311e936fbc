"""Statements that the writer of a store repeats, on its open connection: rows, and what hangs on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, Select, Table, insert, select, update
from sqlalchemy.exc import IntegrityError

from harness.records import KernelUse, Record
from harness.store.tables import kernels, records, samples, variants

__all__ = [
    "insert_kernels",
    "insert_many",
    "insert_once",
    "insert_records",
    "insert_row",
    "locked",
    "set_simulated",
]


def locked(query: Select[int]) -> Select[int]:
    """The rows, locked to the end of the transaction; SQLite, where a writer is alone, needs no lock.

    Rows that refer to them may still be added by others.
    """
    return query.with_for_update(key_share=True)


def insert_row(connection: Connection, table: Table, row: Mapping[str, Any]) -> int:
    """Insert a row; returns its id."""
    id_: int = connection.execute(insert(table).returning(table.c.id), row).scalar_one()
    return id_


def insert_many(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, where there are any."""
    if rows:
        connection.execute(insert(table), rows)  # executemany


def insert_once(connection: Connection, table: Table, key: Mapping[str, Any], rest: Mapping[str, Any]) -> int:
    """The id of the row with this unique key, inserted where it is missing."""
    [(name, value)] = key.items()
    find = select(table.c.id).where(table.c[name] == value)
    found: int | None = connection.scalar(find)
    if found is not None:
        return found
    try:
        with connection.begin_nested():
            return insert_row(connection, table, {**key, **rest})
    except IntegrityError:
        # Not in SQLite, where a writer is alone; in PostgreSQL another may just have been faster.
        raced: int | None = connection.scalar(find)
        if raced is None:
            raise
        return raced


def insert_records(connection: Connection, cell_id: int, rows: Sequence[Record]) -> None:
    """Insert records of a cell with their raw readings."""
    if not rows:
        return
    columns = ("metric", "value", "unit", "lower", "upper", "n", "mode", "note")
    values = [{"cell_id": cell_id} | {name: getattr(record, name) for name in columns} for record in rows]
    statement = insert(records).returning(records.c.id, sort_by_parameter_order=True)
    ids = connection.scalars(statement, values).all()
    readings = [
        {"record_id": record_id, "position": position, "value": value}
        for record_id, record in zip(ids, rows, strict=True)
        for position, value in enumerate(record.samples)
    ]
    insert_many(connection, samples, readings)


def insert_kernels(connection: Connection, cell_id: int, rows: Sequence[KernelUse]) -> None:
    """Insert the kernels of a cell, each with its place in its phase."""
    positions: Counter[str] = Counter()
    values = []
    for kernel in rows:
        row = {field.name: getattr(kernel, field.name) for field in fields(kernel)}
        values.append(row | {"cell_id": cell_id, "position": positions[kernel.phase]})
        positions[kernel.phase] += 1
    insert_many(connection, kernels, values)


def set_simulated(connection: Connection, variant_id: int, simulated: bool) -> None:
    """Store whether a variant is simulated."""
    connection.execute(update(variants).where(variants.c.id == variant_id).values(simulated=simulated))
