"""The schema, tidy: one fact a row, one meaning a column.

::

    machines ─┐ ┌── imports
              sweeps ──< sweep_cells >── cells ──< records ──< samples
                                           │  ├──< items
                         effects >── variants  └──< kernels

`cells` rows never change once written: a retry, or `--fresh`, makes a new row with the same key,
and the newest id of a key is the current one. `cells.sweep_id` is the sweep that measured it,
`sweep_cells` links it to every sweep that uses it. The only rows added to a cell later are derived
records (flips against a baseline).

`catalogue` repeats, of every model, what was measured of it (metric and place, without values): it is
written together with the records, so that a list of what can be shown or compared is read from a few
rows and not from all records. Nothing is exported of it; an import makes it anew.

`imports` marks the sweeps that were measured elsewhere and read from a file. The keys of their cells
and variants begin with `IMPORTED`, so they are never taken for what this store measured itself.

The migrations build this schema; a test holds the two equal. Times are ISO 8601 in UTC.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
)

from harness.store.encoding import CleanText, Real, RowId, Whole

__all__ = [
    "IMPORTED",
    "REVISION",
    "VERSION_TABLE",
    "catalogue",
    "cells",
    "effects",
    "imports",
    "items",
    "kernels",
    "machines",
    "metadata",
    "records",
    "samples",
    "sweep_cells",
    "sweeps",
    "variants",
]

REVISION = "0004"
"""The revision of this schema, the number of the last migration: four digits, so that they sort."""

VERSION_TABLE = "harness_store_version"
"""Where a store keeps its revision; the name tells a store from other databases under Alembic."""

IMPORTED = "imported:"
"""How the keys of imported variants and cells begin: ``imported:<what tells them apart>:<key>``."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

machines = Table(
    "machines",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("fingerprint", Text, nullable=False, unique=True),
    Column("facts", JSON, nullable=False),
    Column("first_seen_at", Text, nullable=False),
)

sweeps = Table(
    "sweeps",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("machine_id", RowId, ForeignKey("machines.id"), nullable=False),
    Column("command", CleanText, nullable=False),
    Column("config", JSON, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("manifest_end", JSON),
    Column("cells_planned", Integer, nullable=False),
    Column("status", Text, nullable=False),  # running | finished | interrupted
    Column("started_at", Text, nullable=False),
    Column("finished_at", Text),
)

variants = Table(
    "variants",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("key", Text, nullable=False, unique=True),
    Column("sweep_id", RowId, ForeignKey("sweeps.id"), nullable=False),  # the first that made it
    Column("model", Text, nullable=False),
    Column("model_identity", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("chain", JSON, nullable=False),
    Column("family", Text, nullable=False),
    Column("seed", Whole, nullable=False),
    Column("dtype", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("device_name", Text, nullable=False),
    Column("synthetic", Boolean, nullable=False),
    Column("model_info", JSON, nullable=False),
    Column("simulated", Boolean),  # NULL until the effect has been measured
    Index(None, "family", "model"),  # the baselines, of which there are few
)

effects = Table(
    "effects",
    metadata,
    Column("variant_id", RowId, ForeignKey("variants.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("module", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("changed", Boolean, nullable=False),
    Column("dtype", Text, nullable=False),
    Column("parameters", Whole, nullable=False),
    Column("bytes_before", Whole, nullable=False),
    Column("bytes_after", Whole, nullable=False),
    Column("stored_bits_per_weight", Real),
    Column("sparsity", Real),
    Column("nm_pattern", Text),
    Column("simulated", Boolean, nullable=False),
    Column("kernel", Text),
)

cells = Table(
    "cells",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("key", Text, nullable=False),
    Column("variant_id", RowId, ForeignKey("variants.id"), nullable=False),
    Column("sweep_id", RowId, ForeignKey("sweeps.id"), nullable=False),
    Column("kind", Text, nullable=False),  # transform | scenario | task
    Column("task", Text),
    Column("scenario", Text),
    Column("status", Text, nullable=False),
    Column("reason", CleanText),
    Column("traceback", CleanText),
    Column("log_tail", CleanText),
    Column("started_at", Text, nullable=False),
    Column("seconds", Real, nullable=False),
    Index(None, "key", "id"),  # the newest id of each key, without touching the table
    Index(None, "variant_id"),
    Index(None, "kind", "task", "scenario", "variant_id"),  # all variants at one place
    Index(None, "status", "variant_id"),
)

sweep_cells = Table(
    "sweep_cells",
    metadata,
    Column("sweep_id", RowId, ForeignKey("sweeps.id"), primary_key=True),
    Column("cell_id", RowId, ForeignKey("cells.id"), primary_key=True),
    Index(None, "cell_id"),
    sqlite_with_rowid=False,
)

records = Table(
    "records",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("cell_id", RowId, ForeignKey("cells.id"), nullable=False),
    Column("metric", Text, nullable=False),
    Column("value", Real),  # NULL is NaN
    Column("unit", Text, nullable=False),
    Column("lower", Real),
    Column("upper", Real),
    Column("n", Whole, nullable=False),
    Column("mode", Text),
    Column("note", CleanText),
    Index(None, "cell_id", "metric"),
)

catalogue = Table(
    "catalogue",
    metadata,
    Column("model", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("place", Text, primary_key=True),  # the task's name, the scenario's label, or "transform"
    Column("metric", Text, primary_key=True),
    Column("unit", Text, primary_key=True),
    Column("item_limit", Whole, primary_key=True),  # of a task's items; 0 is no limit
    Column("windows", Text, primary_key=True),  # of a perplexity, as its note says it, or nothing
    sqlite_with_rowid=False,
)

samples = Table(
    "samples",
    metadata,
    Column("record_id", RowId, ForeignKey("records.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("value", Real),  # NULL is NaN
    sqlite_with_rowid=False,
)

items = Table(
    "items",
    metadata,
    Column("cell_id", RowId, ForeignKey("cells.id"), primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("position", Whole, primary_key=True),
    Column("outcome", Real),  # NULL is NaN
    Column("detail", JSON, nullable=False),
)

kernels = Table(
    "kernels",
    metadata,
    Column("cell_id", RowId, ForeignKey("cells.id"), primary_key=True),
    Column("phase", Text, primary_key=True),  # prefill | decode
    Column("position", Integer, primary_key=True),  # the slowest is 0
    Column("name", CleanText, nullable=False),
    Column("family", Text, nullable=False),
    Column("calls", Whole, nullable=False),
    Column("seconds", Real, nullable=False),
    Column("share", Real, nullable=False),
)

imports = Table(
    "imports",
    metadata,
    Column("sweep_id", RowId, ForeignKey("sweeps.id"), primary_key=True),
    Column("content_id", Text, nullable=False, unique=True),  # the same sweep in every store
    Column("origin", CleanText, nullable=False),  # the file's name, or what the user called it
    Column("imported_at", Text, nullable=False),
)
