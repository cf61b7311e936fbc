"""Which sweeps came out of a file, and out of which."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

    op.create_table(
        "imports",
        sa.Column("sweep_id", row_id, nullable=False),
        sa.Column("content_id", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("imported_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sweep_id", name="pk_imports"),
        sa.UniqueConstraint("content_id", name="uq_imports_content_id"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name="fk_imports_sweep_id_sweeps"),
    )
