"""Adding the rows of exported files to a store: all or nothing, and never over what is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, insert, select, text

from harness.store.catalogue import add_to_catalogue
from harness.store.chunks import chunks
from harness.store.exchange_layout import Section, sections
from harness.store.exchange_read import Contents
from harness.store.exchange_rows import Row, imported_key, sweep_identity, variant_digest
from harness.store.store import Store
from harness.store.tables import cells, imports, machines, sweep_cells, sweeps, variants

__all__ = ["Imported", "import_results"]


@dataclass(frozen=True)
class Imported:
    """What came of one file: cells that were added, and cells that were there already.

    `sweeps` counts the sweeps that were new; `own` those that this very store measured, whose cells
    are left out; `measuring_versions` are those of the file's sweeps.
    """

    file: Path
    sweeps: int
    added: int
    known: int
    own: int
    measuring_versions: tuple[int, ...]


def import_results(store: Store, read: Iterable[Contents], origin: str | None = None) -> list[Imported]:
    """Add what `read_results` read, in one transaction.

    Importing a file again adds nothing. Sweeps are marked as imported, from `origin` or from the
    file's name, and no sweep of this store takes an imported cell for one that it measured.

    Raises:
        StoreError: the store cannot be written; nothing has been added then.
    """
    with store.writing() as connection:
        if connection.dialect.name == "postgresql":  # SQLite has one writer at a time anyway
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('harness import'))"))
        cell_ids: list[int] = []
        done = [_add(connection, contents, origin or contents.file.name, cell_ids) for contents in read]
        add_to_catalogue(connection, cell_ids)
        return done


def _add(connection: Connection, contents: Contents, origin: str, cell_ids: list[int]) -> Imported:
    """Add what one file holds, and the ids of its new cells to the list."""
    own = _own_identities(connection)
    sweep_ids, new = _add_sweeps(connection, contents, own, origin)
    variant_rows, cell_rows = [], []
    left_out = 0
    for variant in contents.variants:
        listed = [child for child in variant.children if child.section.name == "cells"]
        wanted = [cell for cell in listed if sweep_ids[cell.values["sweep"] - 1] is not None]
        left_out += len(listed) - len(wanted)
        if wanted:
            variant_rows.append((variant, sweep_ids[wanted[0].values["sweep"] - 1]))
            cell_rows += [(cell, variant) for cell in wanted]
    variant_ids = _add_variants(connection, variant_rows)
    added = _add_cells(connection, contents, cell_rows, variant_ids, sweep_ids)
    cell_ids += added
    return Imported(
        file=contents.file,
        sweeps=new,
        added=len(added),
        known=len(cell_rows) - len(added),
        own=len({identity for identity in contents.identities if identity in own}),
        measuring_versions=contents.measuring_versions,
    )


def _own_identities(connection: Connection) -> set[str]:
    """The identities of the sweeps that this store measured itself."""
    query = (
        select(machines.c.facts, sweeps.c.manifest, sweeps.c.started_at, sweeps.c.cells_planned)
        .join(machines, machines.c.id == sweeps.c.machine_id)
        .where(sweeps.c.id.not_in(select(imports.c.sweep_id)))
    )
    return {sweep_identity(row["facts"], dict(row)) for row in connection.execute(query).mappings()}


def _add_sweeps(
    connection: Connection, contents: Contents, own: set[str], origin: str
) -> tuple[list[int | None], int]:
    """The id of each of the file's sweeps, None for those measured here; and how many are new."""
    ids: list[int | None] = []
    new = 0
    for row, identity in zip(contents.sweeps, contents.identities, strict=True):
        find = select(imports.c.sweep_id).where(imports.c.content_id == identity)
        known = None if identity in own else connection.scalar(find)
        if identity in own or known is not None:
            ids.append(known)
            continue
        facts = contents.machines[row.values["machine"] - 1].values["facts"]
        values = {**_stored(row), "machine_id": Store.machine_id(connection, facts)}
        sweep_id = connection.scalar(insert(sweeps).returning(sweeps.c.id), values)
        mark = {"sweep_id": sweep_id, "content_id": identity, "origin": origin, "imported_at": _now()}
        connection.execute(insert(imports), mark)
        ids.append(sweep_id)
        new += 1
    return ids, new


def _add_variants(connection: Connection, rows: Sequence[tuple[Row, int | None]]) -> dict[int, int]:
    """The ids of variants by their line. One whose every detail is stored already is used again."""
    keys = {row.line: imported_key(variant_digest(row), row.values["key"]) for row, _ in rows}
    ids = _ids_by_key(connection, variants, keys.values())
    new = {keys[row.line]: (row, sweep) for row, sweep in rows if keys[row.line] not in ids}
    values = [{**_stored(row), "key": key, "sweep_id": sweep} for key, (row, sweep) in new.items()]
    ids |= dict(zip(new, _insert(connection, variants, values), strict=True))
    _add_below(connection, sections()["variants"], [(row, ids[key]) for key, (row, _) in new.items()])
    return {line: ids[key] for line, key in keys.items()}


def _add_cells(
    connection: Connection,
    contents: Contents,
    rows: Sequence[tuple[Row, Row]],
    variant_ids: Mapping[int, int],
    sweep_ids: Sequence[int | None],
) -> list[int]:
    """Add the cells that are missing with all that hangs on them, and every link; the ids of the new."""
    keys = {
        cell.line: imported_key(contents.identities[cell.values["sweep"] - 1], cell.values["key"])
        for cell, _ in rows
    }
    ids = _ids_by_key(connection, cells, keys.values())
    # Files list cells by variant; of several for one place the later id counts as the newer everywhere.
    begun = [(str(sweep.values["started_at"]), number) for number, sweep in enumerate(contents.sweeps)]
    new = sorted(
        ((cell, variant) for cell, variant in rows if keys[cell.line] not in ids),
        key=lambda pair: begun[pair[0].values["sweep"] - 1],
    )
    values = [
        {
            **_stored(cell),
            "key": keys[cell.line],
            "variant_id": variant_ids[variant.line],
            "sweep_id": sweep_ids[cell.values["sweep"] - 1],
        }
        for cell, variant in new
    ]
    inserted = _insert(connection, cells, values)
    ids |= {keys[cell.line]: id_ for (cell, _), id_ in zip(new, inserted, strict=True)}
    _add_below(connection, sections()["cells"], [(cell, ids[keys[cell.line]]) for cell, _ in new])
    links = {
        (sweep_ids[number - 1], ids[keys[cell.line]])
        for cell, _ in rows
        for number in (cell.values["sweep"], *cell.values["used_by"])
    }
    _link(connection, {(sweep, cell) for sweep, cell in links if sweep is not None})
    return inserted


def _add_below(connection: Connection, parent: Section, rows: Sequence[tuple[Row, int]]) -> None:
    """Insert what hangs on rows that were just inserted, level by level."""
    for section in sections().values():
        if section.parent != parent.name or section.name == "cells":
            continue
        below = [(child, id_) for row, id_ in rows for child in row.children if child.section is section]
        values = [{**_stored(child), str(section.link): id_} for child, id_ in below]
        if section.has_id:
            ids = _insert(connection, section.table, values)
            _add_below(connection, section, [(c, id_) for (c, _), id_ in zip(below, ids, strict=True)])
        elif values:
            connection.execute(insert(section.table), values)


def _link(connection: Connection, wanted: set[tuple[int, int]]) -> None:
    for chunk in chunks(sorted({sweep for sweep, _ in wanted})):
        query = select(sweep_cells.c.sweep_id, sweep_cells.c.cell_id)
        wanted -= {(s, c) for s, c in connection.execute(query.where(sweep_cells.c.sweep_id.in_(chunk)))}
    if wanted:
        values = [{"sweep_id": sweep, "cell_id": cell} for sweep, cell in sorted(wanted)]
        connection.execute(insert(sweep_cells), values)


def _ids_by_key(connection: Connection, table: Table, keys: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for chunk in chunks(sorted(set(keys))):
        query = select(table.c.key, table.c.id).where(table.c.key.in_(chunk))
        found |= {row.key: row.id for row in connection.execute(query)}
    return found


def _insert(connection: Connection, table: Table, values: Sequence[Mapping[str, Any]]) -> list[int]:
    if not values:
        return []
    statement = insert(table).returning(table.c.id, sort_by_parameter_order=True)
    return list(connection.scalars(statement, values))


def _stored(row: Row) -> dict[str, Any]:
    return {name: row.values[name] for name in row.section.stored}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
