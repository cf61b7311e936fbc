"""``python -m harness.store.migrations "add a column"``: write the next revision's script.

The script is filled in with the difference between a store of the last revision and the tables as they
are now; read it before it is released, since a renamed column looks like a dropped and an added one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from sqlalchemy import create_engine

from harness.store.migrations import alembic_config, upgrade

__all__ = ["write_next"]


def write_next(message: str) -> Path:
    """Write the next script and return its path."""
    from alembic import command
    from alembic.script import Script, ScriptDirectory

    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{folder}/scratch.db")
        with engine.begin() as connection:
            config = alembic_config(connection)
            head = ScriptDirectory.from_config(config).get_current_head() or "0000"
            upgrade(connection, head)
            number = f"{int(head) + 1:04d}"
            script = command.revision(config, message, autogenerate=True, rev_id=number)
        engine.dispose()
    assert isinstance(script, Script)
    return Path(script.path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit('usage: python -m harness.store.migrations "what changes"')
    print(write_next(sys.argv[1]))
