"""Whether a store holds what a store may hold, asked when reading one has failed.

SQLite keeps any value in any column, and a flipped bit can leave a file that opens. Looking at every row
before every reading would cost more than the reading, so this looks only after something went wrong: a fault
found here is told as damage; an error without a fault is the harness's own and stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import JSON, Boolean, Connection, Engine, Integer, Table, Text, text
from sqlalchemy.exc import SQLAlchemyError

from harness.records import CellKind, Status
from harness.store.encoding import CleanText, Real, Whole
from harness.store.tables import cells, metadata, variants

__all__ = ["first_fault"]

_ARRAYS = (variants.c.chain,)
_STEP = (
    "json_type(value) IS NOT 'object' OR json_type(value, '$.name') IS NOT 'text' "
    "OR json_type(value, '$.options') IS NOT 'object'"
)


def first_fault(engine: Engine) -> str | None:
    """What is wrong with a SQLite store, in a few words; None where nothing is found."""
    if engine.dialect.name != "sqlite":
        return None
    try:
        with engine.connect() as connection:
            return next(_faults(connection), None)
    except SQLAlchemyError as error:
        return " ".join(str(error).split())[:200]


def _faults(connection: Connection) -> Iterator[str]:
    integrity = connection.scalar(text("PRAGMA integrity_check(1)"))
    if integrity != "ok":
        yield str(integrity)
    for table, row, parent, _ in connection.execute(text("PRAGMA foreign_key_check")):
        yield f"row {row} of {table} points to a row of {parent} that is not there"
    for table in metadata.sorted_tables:
        yield from _wrong_values(connection, table)
    for column, known in ((cells.c.status, Status), (cells.c.kind, CellKind)):
        names = ", ".join(f"'{each}'" for each in known)
        if _any(connection, column.table, f"{column.name} NOT IN ({names})"):
            yield f"cells has a {column.name} that does not exist"
    steps = f"EXISTS (SELECT 1 FROM json_each(chain) WHERE {_STEP})"
    if _any(connection, variants, f"json_array_length(chain) = 0 OR {steps}"):
        yield "variants has a chain that is none"


def _wrong_values(connection: Connection, table: Table) -> Iterator[str]:
    for column in table.columns:
        name = f'"{column.name}"'
        if isinstance(column.type, JSON):
            shape = "array" if column in _ARRAYS else "object"
            wrong = f"NOT json_valid({name}) OR json_type({name}) IS NOT '{shape}'"
            if column.nullable:
                wrong = f"({wrong}) AND json_type({name}) IS NOT 'null'"
        elif isinstance(column.type, Boolean):
            wrong = f"{name} NOT IN (0, 1)"
        elif isinstance(column.type, Real):
            wrong = f"typeof({name}) NOT IN ('real', 'integer')"
        elif isinstance(column.type, (Integer, Whole)):
            wrong = f"typeof({name}) != 'integer'"
        elif isinstance(column.type, (Text, CleanText)):
            wrong = f"typeof({name}) != 'text'"
        else:
            continue
        absent = "0" if column.nullable else f"{name} IS NULL"
        if _any(connection, table, f"{absent} OR ({name} IS NOT NULL AND ({wrong}))"):
            yield f"{table.name} has a {column.name} that is none"


def _any(connection: Connection, table: Table, condition: str) -> bool:
    query = f'SELECT EXISTS (SELECT 1 FROM "{table.name}" WHERE {condition})'
    return bool(connection.scalar(text(query)))
