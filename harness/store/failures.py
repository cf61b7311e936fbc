"""The one place where a database's errors become a `StoreError` of one clear line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from harness.errors import StoreError
from harness.privacy import without_passwords
from harness.store.encoding import Unstorable

__all__ = ["explain", "translated"]

_SQLITE = {
    "SQLITE_FULL": "the disk is full; free some space and run the same command again "
    "(every finished cell is kept)",
    "SQLITE_BUSY": "locked by another process; wait for it to end or stop it",
    "SQLITE_LOCKED": "locked by another process; wait for it to end or stop it",
    "SQLITE_CORRUPT": "damaged ({text}); restore a backup, or recover what is readable with "
    "the sqlite3 shell's .recover",
    "SQLITE_NOTADB": "not a results store (not a SQLite database)",
    "SQLITE_READONLY_ROLLBACK": "left half written by a process that was killed; a sweep puts it right; "
    "run: harness sweep",
    "SQLITE_READONLY": "read-only, so nothing can be written to it",
    "SQLITE_CANTOPEN": "cannot be opened; check that it and its directory exist and are accessible",
    "SQLITE_IOERR": "reading or writing its file failed ({text}); check the disk",
}

# PostgreSQL: the server was stopped, crashed, or is only just starting.
_LOST = ("57P01", "57P02", "57P03", "08000", "08003", "08006")


@contextmanager
def translated(label: str) -> Iterator[None]:
    """Turn what the database raises inside into a `StoreError` that names the store.

    Raises:
        StoreError: the disk is full, the store is locked, damaged, read-only, unreachable ...
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        raise StoreError(f"results store {label}: {explain(error)}") from error
    except Unstorable as error:  # PostgreSQL's driver lets it through as it is
        raise StoreError(f"results store {label}: {error}") from error
    except UnicodeEncodeError as error:  # an argument of bytes that are no UTF-8
        raise StoreError(f"results store {label}: {error.object!r} is no text that it could hold") from error
    except UnicodeDecodeError as error:  # a name in the schema, or a message about one
        raise StoreError(
            f"results store {label}: damaged (a text in it is no UTF-8); restore a backup"
        ) from error
    except SQLAlchemyError as error:  # an exhausted connection pool, a statement it cannot build
        raise StoreError(f"results store {label}: {_one_line(error)}") from error


def explain(error: DBAPIError | sqlite3.Error) -> str:
    """What happened and what helps, in one line, without the statement and its parameters."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name = getattr(cause, "sqlite_errorname", "")
    for prefix, sentence in _SQLITE.items():
        if name.startswith(prefix):
            return sentence.format(text=_one_line(cause))
    if isinstance(error, DBAPIError) and (error.connection_invalidated or _state(cause) in _LOST):
        return (
            f"the connection to the server was lost ({_one_line(cause)}); run the same command again "
            "(every finished cell is kept)"
        )
    return _one_line(cause)


def _state(cause: BaseException) -> str:
    return str(getattr(cause, "sqlstate", None) or "")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return without_passwords(lines[0]) if lines else type(error).__name__
