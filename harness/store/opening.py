"""Finding, checking, creating and migrating a store, before anything is written to it.

Durability in SQLite: WAL, so that readers never wait for the writer, and ``synchronous=FULL``, so
that a committed cell survives not only ``kill -9`` (for which NORMAL would do) but a power cut or a
cloud machine that is taken away as well; it costs one fsync a cell.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool, QueuePool

from harness.errors import MissingExtra, StoreError
from harness.privacy import without_passwords
from harness.store.encoding import dump_json, load_json
from harness.store.failures import translated
from harness.store.tables import REVISION, VERSION_TABLE

__all__ = ["BUSY_TIMEOUT_S", "RECONNECT_TIMEOUT_S", "label", "locate", "open_reader", "open_writer"]

BUSY_TIMEOUT_S = 30.0
_WAIT_S = 0.5  # of these, at a time
_REFUSED_PAUSE_S = 0.005  # where SQLite does not wait at all
RECONNECT_TIMEOUT_S = 30.0
_RECONNECT_PAUSE_S = 0.5
_SQLITE_HEADER = b"SQLite format 3\0"
_FILL = "run: harness sweep"


def locate(target: str | Path) -> Path | URL:
    """A SQLite file, or the URL of a server.

    Raises:
        StoreError: neither a path nor a URL of a database that can hold a store.
    """
    if isinstance(target, str) and "://" in target:
        try:
            url = make_url(target.replace("postgres://", "postgresql://", 1))
        except (ArgumentError, ValueError):  # a port that is no number
            shown = without_passwords(target)
            raise StoreError(f"results store {shown!r} is not a valid database URL") from None
        if url.get_backend_name() == "sqlite":
            return locate(url.database or "")
        if url.get_backend_name() != "postgresql":
            raise StoreError(
                f"results store {label(url)}: unknown database {url.get_backend_name()!r}; "
                "give a file or a postgresql:// URL"
            )
        if url.drivername == "postgresql":  # name the driver: SQLAlchemy's default has changed
            url = url.set(drivername="postgresql+psycopg")
        return url
    if str(target) in ("", ".", ":memory:"):
        raise StoreError(f"results store {str(target)!r} is neither a file nor a database URL")
    return Path(os.path.abspath(os.path.expanduser(target)))


# --- opening ----------------------------------------------------------------------------------


def open_writer(place: Path | URL) -> Engine:
    """An engine on a store of this version that is created or migrated first where needed.

    Raises:
        StoreError: not a store, of a newer version, locked; its directory missing or read-only.
    """
    with translated(label(place)):
        if isinstance(place, URL):
            engine = _server_engine(place, read_only=False)
            with _disposed_on_error(engine):
                if _engine_revision(engine, label(place)) != REVISION:
                    _migrate(engine, place)
            return engine
        _check_writable(place)
        _undo_half_written(place)
        if _file_revision(place) != REVISION:
            # Rebuilding a table, as migrations on SQLite do, must not cascade over foreign keys.
            migrating = _file_engine(place, "rwc", foreign_keys=False)
            try:
                _migrate(migrating, place)
            finally:
                migrating.dispose()
        engine = _file_engine(place, "rw")
        # Connect now: a store that cannot be written says so here, and the log that the look at
        # the file left beside it is cleared by the last one who closes a writing connection.
        with _disposed_on_error(engine):
            engine.connect().close()
        return engine


def open_reader(place: Path | URL) -> Engine:
    """An engine that cannot write.

    Raises:
        StoreError: missing, empty, not a store, or not of this version.
    """
    where = label(place)
    with translated(where):
        if isinstance(place, Path):
            if not place.exists():
                raise StoreError(f"no results store at {where}; {_FILL}")
            _check_readable(_file_revision(place), where)
            return _file_engine(place, "ro")
        engine = _server_engine(place, read_only=True)
        with _disposed_on_error(engine):
            _check_readable(_engine_revision(engine, where), where)
        return engine


def label(place: Path | URL) -> str:
    """How messages name a store; a password in a URL is hidden."""
    return str(place) if isinstance(place, Path) else without_passwords(str(place))


# --- what is there ----------------------------------------------------------------------------


def _check_writable(path: Path) -> None:
    parent = path.parent
    if not parent.is_dir():
        raise StoreError(f"results store {path}: the directory {parent} does not exist")
    if path.is_dir():
        raise StoreError(f"results store {path} is a directory, not a file")
    # SQLite writes its log beside the file, so a writable file in a read-only directory is no use.
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StoreError(f"results store {path}: the directory {parent} is read-only")
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"results store {path} is read-only")


def _undo_half_written(path: Path) -> None:
    """Undo what a process was writing into a SQLite file when it was killed, as SQLite itself does.

    A file has no write-ahead log before its first page is written, so its first process may leave a
    rollback journal, before whose end nobody can read the file, and which no reader may end.
    """
    if path.exists() and Path(f"{path}-journal").exists():
        with closing(sqlite3.connect(_uri(path, "rw"), uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
            connection.execute("SELECT name FROM sqlite_master")


def _file_revision(path: Path) -> str | None:
    """The revision of a SQLite file; None where there is none yet. The file is not changed."""
    if path.is_dir():
        raise StoreError(f"results store {path} is a directory, not a file")
    try:
        with path.open("rb") as file:
            header = file.read(len(_SQLITE_HEADER))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"results store {path} cannot be read: {error.strerror}") from error
    if not header:
        return None
    if header != _SQLITE_HEADER:
        raise StoreError(f"{path} is not a results store (not a SQLite database)")
    engine = _file_engine(path, "ro")
    try:
        return _engine_revision(engine, str(path))
    finally:
        engine.dispose()


def _engine_revision(engine: Engine, where: str) -> str | None:
    with engine.connect() as connection:
        return _revision(connection, where)


def _revision(connection: Connection, where: str) -> str | None:
    tables = inspect(connection).get_table_names()
    if VERSION_TABLE not in tables:
        if tables:
            raise StoreError(
                f"{where} is not a results store (it is another database, with the table "
                f"{sorted(tables)[0]!r})"
            )
        return None
    revision: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
    if not isinstance(revision, str | None):
        raise StoreError(f"results store {where}: damaged (its version is none); restore a backup")
    if revision is not None and revision > REVISION:
        raise StoreError(
            f"results store {where} was written by a newer harness (revision {revision}, this one "
            f"knows {REVISION}); upgrade: pip install --upgrade transformer-harness"
        )
    return revision


def _check_readable(revision: str | None, where: str) -> None:
    if revision is None:
        raise StoreError(f"results store {where} is empty; {_FILL}")
    if revision < REVISION:
        raise StoreError(
            f"results store {where} is of an older version (revision {revision}, this "
            f"harness reads {REVISION}); a sweep migrates it, after a backup; {_FILL}"
        )


# --- creating and migrating -------------------------------------------------------------------


def _migrate(engine: Engine, place: Path | URL) -> None:
    from harness.store import migrations  # Alembic is imported only where it is needed

    with engine.execution_options(harness_write=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('harness store'))"))
        revision = _revision(connection, label(place))  # another process may have been faster
        if revision == REVISION:
            return
        if revision is not None and isinstance(place, Path):
            _back_up(place, revision)
        migrations.upgrade(connection)


def _back_up(path: Path, revision: str) -> Path:
    """Copy the committed state of a store beside it; an earlier backup is never overwritten."""
    base = path.with_name(f"{path.name}.backup-{revision}")
    copy, number = base, 1
    while copy.exists():
        number += 1
        copy = base.with_name(f"{base.name}-{number}")
    unfinished = copy.with_name(copy.name + ".part")
    with (
        closing(sqlite3.connect(_uri(path, "ro"), uri=True)) as source,
        closing(sqlite3.connect(unfinished)) as target,
    ):
        source.backup(target)
    unfinished.replace(copy)
    return copy


# --- engines ----------------------------------------------------------------------------------


@contextmanager
def _disposed_on_error(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


def _uri(path: Path, mode: str) -> str:
    uri = f"{path.as_uri()}?mode={mode}"
    # In a directory that cannot be written SQLite cannot make the shared memory file that a WAL
    # store is read with. Without a log nothing is being written, so it may be read as it is.
    lonely = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
    return uri + "&immutable=1" if mode == "ro" and lonely else uri


def _file_engine(path: Path, mode: str, *, foreign_keys: bool = True) -> Engine:
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            _uri(path, mode),
            uri=True,
            timeout=BUSY_TIMEOUT_S if mode == "ro" else min(_WAIT_S, BUSY_TIMEOUT_S),
            check_same_thread=False,  # the pool hands a connection to one thread at a time
            isolation_level=None,  # transactions are begun below, not guessed by the driver
        )
        try:
            if mode == "ro":
                connection.execute("PRAGMA query_only = ON")
            else:
                # Two that make the log of a new file wait for each other, and SQLite refuses one at
                # once, whatever its timeout.
                _once_free(lambda: connection.execute("PRAGMA journal_mode = WAL"))
                _once_free(lambda: connection.execute("PRAGMA synchronous = FULL"))
                connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        except BaseException:
            connection.close()
            raise
        return connection

    unwritable = mode == "ro" and not os.access(path.parent, os.W_OK)
    # There each look at the file decides anew how it may be read, so no connection is kept.
    pool = NullPool if unwritable else QueuePool
    engine = _engine(URL.create("sqlite", database=str(path)), creator=connect, poolclass=pool)
    if unwritable:
        _refuse_changes(engine, path)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that turns from reading to writing is refused at once when another process
        # has written in between; one that says so from the start waits for its turn.
        writes = connection.get_execution_options().get("harness_write", False)
        if writes:
            _once_free(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        else:
            connection.exec_driver_sql("BEGIN")

    return engine


def _refuse_changes(engine: Engine, path: Path) -> None:
    """Have each look at a file that was taken for one that nobody writes fail where somebody did."""

    def state() -> tuple[int, ...]:
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # With a log beside it, it is read as any other file, and may change.
        connection.info["state"] = None if Path(f"{path}-wal").exists() else state()

    @event.listens_for(engine, "rollback")
    def rollback(connection: Connection) -> None:
        if connection.info["state"] not in (None, state()):
            raise StoreError(f"results store {path}: changed while it was read; run the same command again")


def _once_free(statement: Callable[[], object]) -> None:
    """Run a statement, once no other connection is in its way.

    SQLite waits inside one call, in which no signal is handled: so in many short waits, that Ctrl-C need
    not wait for another writer.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            statement()
        except (sqlite3.OperationalError, OperationalError) as error:
            cause = error.orig if isinstance(error, OperationalError) else error
            busy = getattr(cause, "sqlite_errorname", "").startswith("SQLITE_BUSY")
            if not busy or time.monotonic() >= deadline:
                raise
            time.sleep(_REFUSED_PAUSE_S)
        else:
            return


def _server_engine(url: URL, *, read_only: bool) -> Engine:
    options = {"postgresql_readonly": True} if read_only else {}
    engine = _engine(url, pool_pre_ping=True, execution_options=options)
    _wait_for_restarts(engine)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # Each statement of a transaction would see what others have committed since the last one.
        # Writers want that: where another was faster, they take what it wrote.
        if not connection.get_execution_options().get("harness_write", False):
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")

    return engine


def _wait_for_restarts(engine: Engine) -> None:
    """Once a server has been reached, wait for it to come back before giving up.

    Only connecting is tried again, never a statement: what was sent when the connection broke may
    have been committed, so a sweep ends there and the next one looks.
    """
    reached = False

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Dialect, _record: Any, arguments: Any, options: Any) -> Any:
        nonlocal reached
        deadline = time.monotonic() + (RECONNECT_TIMEOUT_S if reached else 0.0)
        while True:
            try:
                connection = dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.OperationalError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RECONNECT_PAUSE_S)
            else:
                reached = True
                return connection


def _engine(url: URL, **options: Any) -> Engine:
    codecs: dict[str, Callable[..., Any]] = {
        "json_serializer": dump_json,
        "json_deserializer": load_json,
    }
    try:
        return create_engine(url, **codecs, **options)
    except NoSuchModuleError:
        raise StoreError(f"results store {url}: unknown driver {url.get_driver_name()!r}") from None
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or url.get_driver_name(), "postgres") from None
