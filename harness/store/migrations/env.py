"""What Alembic runs around the scripts; the connection, in a transaction, comes from the caller."""

from __future__ import annotations

from alembic import context

from harness.store.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite changes a column by rebuilding the table
    transactional_ddl=True,  # in SQLite too, since the store begins its transactions itself
)
with context.begin_transaction():
    context.run_migrations()
