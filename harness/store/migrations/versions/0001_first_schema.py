"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    real = sa.Float(53)

    op.create_table(
        "machines",
        sa.Column("id", row_id, nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("first_seen_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_machines"),
        sa.UniqueConstraint("fingerprint", name="uq_machines_fingerprint"),
    )
    op.create_table(
        "sweeps",
        sa.Column("id", row_id, nullable=False),
        sa.Column("machine_id", row_id, nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("manifest_end", sa.JSON()),
        sa.Column("cells_planned", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_sweeps"),
        sa.ForeignKeyConstraint(["machine_id"], ["machines.id"], name="fk_sweeps_machine_id_machines"),
    )
    op.create_table(
        "variants",
        sa.Column("id", row_id, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("sweep_id", row_id, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("model_identity", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("chain", sa.JSON(), nullable=False),
        sa.Column("family", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("device_name", sa.Text(), nullable=False),
        sa.Column("synthetic", sa.Boolean(), nullable=False),
        sa.Column("model_info", sa.JSON(), nullable=False),
        sa.Column("simulated", sa.Boolean()),
        sa.PrimaryKeyConstraint("id", name="pk_variants"),
        sa.UniqueConstraint("key", name="uq_variants_key"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name="fk_variants_sweep_id_sweeps"),
    )
    op.create_table(
        "effects",
        sa.Column("variant_id", row_id, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("module", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("changed", sa.Boolean(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("bytes_before", sa.BigInteger(), nullable=False),
        sa.Column("bytes_after", sa.BigInteger(), nullable=False),
        sa.Column("stored_bits_per_weight", real),
        sa.Column("sparsity", real),
        sa.Column("nm_pattern", sa.Text()),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("kernel", sa.Text()),
        sa.PrimaryKeyConstraint("variant_id", "position", name="pk_effects"),
        sa.ForeignKeyConstraint(["variant_id"], ["variants.id"], name="fk_effects_variant_id_variants"),
    )
    op.create_table(
        "cells",
        sa.Column("id", row_id, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("variant_id", row_id, nullable=False),
        sa.Column("sweep_id", row_id, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("task", sa.Text()),
        sa.Column("scenario", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("traceback", sa.Text()),
        sa.Column("log_tail", sa.Text()),
        sa.Column("started_at", sa.Text(), nullable=False),
        sa.Column("seconds", real, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_cells"),
        sa.ForeignKeyConstraint(["variant_id"], ["variants.id"], name="fk_cells_variant_id_variants"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name="fk_cells_sweep_id_sweeps"),
    )
    op.create_index("ix_cells_key_id", "cells", ["key", "id"])
    op.create_index("ix_cells_variant_id", "cells", ["variant_id"])
    op.create_table(
        "sweep_cells",
        sa.Column("sweep_id", row_id, nullable=False),
        sa.Column("cell_id", row_id, nullable=False),
        sa.PrimaryKeyConstraint("sweep_id", "cell_id", name="pk_sweep_cells"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name="fk_sweep_cells_sweep_id_sweeps"),
        sa.ForeignKeyConstraint(["cell_id"], ["cells.id"], name="fk_sweep_cells_cell_id_cells"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_sweep_cells_cell_id", "sweep_cells", ["cell_id"])
    op.create_table(
        "records",
        sa.Column("id", row_id, nullable=False),
        sa.Column("cell_id", row_id, nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("value", real),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("lower", real),
        sa.Column("upper", real),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("mode", sa.Text()),
        sa.Column("note", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_records"),
        sa.ForeignKeyConstraint(["cell_id"], ["cells.id"], name="fk_records_cell_id_cells"),
    )
    op.create_index("ix_records_cell_id_metric", "records", ["cell_id", "metric"])
    op.create_table(
        "samples",
        sa.Column("record_id", row_id, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("value", real),
        sa.PrimaryKeyConstraint("record_id", "position", name="pk_samples"),
        sa.ForeignKeyConstraint(["record_id"], ["records.id"], name="fk_samples_record_id_records"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "items",
        sa.Column("cell_id", row_id, nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("outcome", real),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("cell_id", "metric", "position", name="pk_items"),
        sa.ForeignKeyConstraint(["cell_id"], ["cells.id"], name="fk_items_cell_id_cells"),
    )
