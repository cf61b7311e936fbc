"""Size, version, contents and imports of a store, and whether it is sound."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from sqlalchemy import func, select, text

from harness.display import scale
from harness.store.frames import frame_of, reading
from harness.store.soundness import first_fault
from harness.store.store import Store
from harness.store.tables import (
    REVISION,
    VERSION_TABLE,
    cells,
    imports,
    machines,
    metadata,
    records,
    sweep_cells,
    sweeps,
    variants,
)

__all__ = ["fault_of", "health", "import_table", "row_counts"]


def health(store: Store) -> pd.DataFrame:
    """Size, version and what is in a store: columns what, value, meaning, all text."""
    counted = (machines, sweeps, variants, cells, records, imports)
    with reading(store) as connection:
        dialect = connection.dialect.name
        revision = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
        counts = [connection.scalar(select(func.count()).select_from(table)) for table in counted]
        if dialect == "sqlite":
            sizes = _file_sizes(Path(store.label))
            free = connection.scalar(text("PRAGMA freelist_count"))
            page_bytes = connection.scalar(text("PRAGMA page_size"))
            sizes.append(("free inside", int(free) * int(page_bytes), "Reused before the file grows."))
        else:
            whole = connection.scalar(text("SELECT pg_database_size(current_database())"))
            sizes = [("database", int(whole), "With everything else that is in this database.")]
    rows = [
        ("store", store.label, "Opened read-only: nothing on these pages can change it."),
        ("kind", {"sqlite": "SQLite", "postgresql": "PostgreSQL"}.get(dialect, dialect), ""),
        ("revision", str(revision), f"Of the tables; this harness writes {REVISION}."),
        *((name, _size(size), meaning) for name, size, meaning in sizes),
    ]
    names = {"cells": "Measurements, superseded ones included.", "records": "Values; raw readings apart."}
    for table, count in zip(counted, counts, strict=True):
        rows.append((table.name, f"{count:,}", names.get(table.name, "")))
    return pd.DataFrame(rows, columns=["what", "value", "meaning"], dtype=object)


def _file_sizes(path: Path) -> list[tuple[str, int, str]]:
    found = [("file", path.stat().st_size, "")]
    log = path.with_name(f"{path.name}-wal")
    if log.exists():
        meaning = "What was written last, folded into the file when the writer closes it."
        found.append(("write-ahead log", log.stat().st_size, meaning))
    return found


def row_counts(store: Store) -> pd.DataFrame:
    """How many rows each table has; reads large tables whole: columns table, rows."""
    with reading(store) as connection:
        rows = [
            (table.name, int(connection.scalar(select(func.count()).select_from(table)) or 0))
            for table in metadata.sorted_tables
        ]
    return pd.DataFrame(rows, columns=["table", "rows"]).sort_values("rows", ascending=False)


def fault_of(store: Store) -> str | None:
    """What is wrong with the store, in a few words; reads all of it. None where it is sound."""
    return first_fault(store.engine)


def import_table(store: Store) -> pd.DataFrame:
    """What was read from files: columns sweep, origin, imported at (UTC), cells."""
    counts = (
        select(sweep_cells.c.sweep_id, func.count().label("cells"))
        .group_by(sweep_cells.c.sweep_id)
        .subquery()
    )
    query = (
        select(
            imports.c.sweep_id.label("sweep"), imports.c.origin, imports.c.imported_at,
            func.coalesce(counts.c.cells, 0).label("cells"),
        )
        .outerjoin(counts, counts.c.sweep_id == imports.c.sweep_id)
        .order_by(imports.c.sweep_id)
    )  # fmt: skip
    with reading(store) as connection:
        frame = frame_of(connection, query)
    frame["imported_at"] = [str(moment)[:19].replace("T", " ") for moment in frame["imported_at"]]
    return frame.rename(columns={"imported_at": "imported at (UTC)"}).astype(
        {"sweep": "int64", "cells": "int64"}
    )


def _size(size_bytes: int) -> str:
    factor, unit = scale("B", [float(size_bytes)])
    return f"{size_bytes * factor:.4g} {unit}"
