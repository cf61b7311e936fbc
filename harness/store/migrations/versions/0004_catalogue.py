"""What was measured of each model, and the indexes by which the dashboard finds its rows."""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_WINDOWS = re.compile(r"seq_len=(\d+), windows=(\d+)")


def upgrade() -> None:
    names = ("model", "kind", "place", "metric", "unit", "item_limit", "windows")
    catalogue = op.create_table(
        "catalogue",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("item_limit", sa.BigInteger(), nullable=False),
        sa.Column("windows", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint(*names, name="pk_catalogue"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_variants_family_model", "variants", ["family", "model"])
    op.create_index(
        "ix_cells_kind_task_scenario_variant_id", "cells", ["kind", "task", "scenario", "variant_id"]
    )
    op.create_index("ix_cells_status_variant_id", "cells", ["status", "variant_id"])
    if rows := _measured(op.get_bind()):
        op.bulk_insert(catalogue, [dict(zip(names, row, strict=True)) for row in sorted(rows)])


def _measured(connection: sa.Connection) -> set[tuple[str, str, str, str, str, int, str]]:
    sweeps = sa.table("sweeps", sa.column("id"), sa.column("config", sa.JSON()))
    limits = {
        sweep: int(config["limit"])
        for sweep, config in connection.execute(sa.select(sweeps.c.id, sweeps.c.config))
        if config and config.get("limit") is not None
    }
    found = connection.execute(
        sa.text(
            "SELECT DISTINCT variants.model, cells.kind, coalesce(cells.task, cells.scenario, cells.kind), "
            "records.metric, records.unit, "
            "CASE WHEN cells.kind = 'task' THEN cells.sweep_id END, "
            "CASE WHEN cells.kind = 'task' AND records.note LIKE '%seq_len=%' THEN records.note END "
            "FROM cells JOIN records ON records.cell_id = cells.id "
            "JOIN variants ON variants.id = cells.variant_id"
        )
    )
    return {
        (model, kind, place, metric, unit, limits.get(sweep, 0), _windows(note))
        for model, kind, place, metric, unit, sweep, note in found
    }


def _windows(note: str | None) -> str:
    match = _WINDOWS.search(note or "")
    return match.group() if match else ""
