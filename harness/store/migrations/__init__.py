"""Building and changing the schema, by Alembic, from inside the package (no alembic.ini).

Revisions are numbered ``0001``, ``0002``, ...; the last one is `harness.store.tables.REVISION`.
"""

from __future__ import annotations

from importlib.resources import files

from alembic.config import Config
from sqlalchemy import Connection

from harness.store.tables import REVISION

__all__ = ["alembic_config", "upgrade"]


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for these scripts on an open connection."""
    config = Config()
    # A percent sign is an interpolation in Alembic's options.
    location = str(files("harness.store.migrations")).replace("%", "%%")
    config.set_main_option("script_location", location)
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection, revision: str = REVISION) -> None:
    """Bring the store behind the connection to a revision, inside the open transaction."""
    from alembic import command

    command.upgrade(alembic_config(connection), revision)
