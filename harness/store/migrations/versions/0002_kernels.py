"""The kernels that ran in one prefill and one decode step of a cell."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    real = sa.Float(53)

    op.create_table(
        "kernels",
        sa.Column("cell_id", row_id, nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("family", sa.Text(), nullable=False),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("seconds", real, nullable=False),
        sa.Column("share", real, nullable=False),
        sa.PrimaryKeyConstraint("cell_id", "phase", "position", name="pk_kernels"),
        sa.ForeignKeyConstraint(["cell_id"], ["cells.id"], name="fk_kernels_cell_id_cells"),
    )
