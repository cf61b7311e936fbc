from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError

from harness.errors import HarnessError, StoreError
from harness.records import CellKind, KernelUse
from harness.store import migrations, opening, queries
from harness.store.store import Store
from harness.store.tables import REVISION, VERSION_TABLE, metadata
from tests.store.rows import begin_sweep, make_result, write_task

LATER = f"{int(REVISION) + 1:04d}"
"""The revision of a harness after this one."""

NEXT = f"""
import sqlalchemy as sa
from alembic import op
revision = "{LATER}"
down_revision = "{REVISION}"
branch_labels = None
depends_on = None


def upgrade():
    with op.batch_alter_table("cells") as table:
        table.add_column(sa.Column("colour", sa.Text()))
        table.alter_column("seconds", new_column_name="duration_s")
"""


FIRST_ROWS = (
    "INSERT INTO machines VALUES (1, 'f', '{}', 't')",
    "INSERT INTO sweeps (id, machine_id, command, config, manifest, cells_planned, status, started_at) "
    "VALUES (1, 1, 'harness sweep', '{}', '{}', 1, 'finished', 't')",
    "INSERT INTO variants VALUES (1, 'v', 1, 'm', 'i', 'rtn', '[]', 'q', 0, 'f', 'cpu', 'c', 0, '{}', 0)",
    "INSERT INTO cells VALUES (1, 'k', 1, 1, 'scenario', NULL, 's', 'ok', NULL, NULL, NULL, 't', 1.0)",
    "INSERT INTO sweep_cells VALUES (1, 1)",
    "INSERT INTO records VALUES (1, 1, 'decode_latency', 0.25, 's', NULL, NULL, 1, 'cpu', NULL)",
)
"""What a sweep left in a store of revision 0001."""


@pytest.fixture
def newer_harness(tmp_path_factory, monkeypatch):
    """A later version of the harness, whose schema has one more revision."""
    scripts = tmp_path_factory.mktemp("later") / "100% migrations"
    shutil.copytree(Path(migrations.__file__).parent, scripts)
    (scripts / "versions" / f"{LATER}_next.py").write_text(NEXT)

    def become(script=NEXT):
        (scripts / "versions" / f"{LATER}_next.py").write_text(script)
        monkeypatch.setattr(migrations, "files", lambda _package: scripts)
        monkeypatch.setattr(opening, "REVISION", LATER)
        monkeypatch.setattr(migrations.upgrade, "__defaults__", (LATER,))
        return scripts

    return become


@pytest.fixture
def ordinary_user():
    """A directory and the rights of a user who is not root (root may write everywhere)."""
    # What the first use imports may lie in root's folders.
    with tempfile.TemporaryDirectory() as other, Store.open(Path(other) / "results.db") as store:
        write_task(store, begin_sweep(store), make_result())
        queries.results(store)
    folder = Path(tempfile.mkdtemp(prefix="store-"))
    was_root = os.geteuid() == 0
    if was_root:
        shutil.chown(folder, "nobody")
        os.setresuid(65534, 65534, 0)
    yield folder
    folder.chmod(0o755)
    if was_root:
        os.setresuid(0, 0, 0)
    shutil.rmtree(folder)


def test_migrations_build_the_tables(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store.reading() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []


def test_migrations_build_the_same_sqlite_tables_to_the_letter(sqlite_store, tmp_path):
    """What compare_metadata does not look at: foreign keys' names, primary keys, rowid tables."""
    created = sqlite3.connect(tmp_path / "created.db")
    from sqlalchemy import create_engine

    engine = create_engine("sqlite://", creator=lambda: created)
    metadata.create_all(engine)
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != :version"

    def schema(connection):
        rows = connection.execute(text(query), {"version": VERSION_TABLE})
        # The order of constraints in a statement means nothing.
        return {name: sorted(part.strip(" \t,") for part in sql.splitlines()) for name, sql in rows}

    with sqlite_store.reading() as migrated, engine.connect() as direct:
        assert schema(migrated) == schema(direct)
    engine.dispose()
    created.close()


def test_the_revision_is_the_last_migration(store):
    from alembic.script import ScriptDirectory

    with store.reading() as connection:
        scripts = ScriptDirectory.from_config(migrations.alembic_config(connection))
        assert scripts.get_current_head() == REVISION
        assert connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}")) == REVISION


def test_settings_of_the_file(sqlite_store):
    with sqlite_store.reading() as connection:
        values = {
            name: connection.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert values == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 500,
    }


def test_a_current_store_is_opened_without_alembic(path):
    Store.open(path).close()
    script = (
        "import sys; from harness.store.store import Store; Store.open(sys.argv[1]).close();"
        "Store.open_readonly(sys.argv[1]).close();"
        "assert not {'alembic', 'torch', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "what?.db", "a#b.db", "ü.db"])
def test_any_file_name(tmp_path, name):
    for target in (tmp_path / name, str(tmp_path / name)):
        Store.open(target).close()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with Store.open_readonly(tmp_path / name) as store:
        assert queries.sweeps(store).empty


def test_a_sqlite_url_and_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Store.open("sqlite:///here.db").close()
    Store.open_readonly("here.db").close()


def test_an_empty_file_becomes_a_store(path):
    path.touch()
    with pytest.raises(StoreError, match="is empty; run: harness sweep"):
        Store.open_readonly(path)
    Store.open(path).close()
    Store.open_readonly(path).close()


# --- what is not a store ----------------------------------------------------------------------


def test_a_missing_store_says_how_to_make_one(path):
    with pytest.raises(StoreError, match=r"^no results store at .*; run: harness sweep$"):
        Store.open_readonly(path)
    assert not path.exists()


@pytest.mark.parametrize("opener", [Store.open, Store.open_readonly])
@pytest.mark.parametrize("content", [b"x", b"name,value\n" * 500, b"\0" * 4096])
def test_another_file_is_left_alone(path, opener, content):
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is not a results store"):
        opener(path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("opener", [Store.open, Store.open_readonly])
def test_another_database_is_left_alone(path, opener):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    connection.execute("INSERT INTO alembic_version VALUES ('9999')")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"not a results store .*table 'alembic_version'"):
        opener(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("opener", [Store.open, Store.open_readonly])
def test_places_that_cannot_hold_a_store(tmp_path, opener):
    with pytest.raises(StoreError, match="is a directory"):
        opener(tmp_path)
    for nonsense in ("", ":memory:", "sqlite://", "mysql://host/name", "://"):
        with pytest.raises(StoreError):
            opener(nonsense)
    with pytest.raises(HarnessError) as error:
        opener(tmp_path / "missing" / "results.db")
    assert "\n" not in str(error.value)
    assert "missing" in str(error.value)


@pytest.mark.parametrize("kept_pages", [3, 30])
def test_a_damaged_store(path, kept_pages):
    with Store.open(path) as store:
        sweep = begin_sweep(store)
        for index in range(200):
            write_task(store, sweep, make_result(f"cell-{index}"))
    content = path.read_bytes()
    kept = content[: kept_pages * 4096]
    path.write_bytes(kept + b"\x5a" * (len(content) - len(kept)))

    def read():
        with Store.open_readonly(path) as store:
            return queries.results(store)

    with pytest.raises(StoreError, match=r"damaged \(database disk image is malformed\); restore"):
        read()


# --- rights -----------------------------------------------------------------------------------


def test_a_read_only_directory(ordinary_user):
    folder = ordinary_user
    with Store.open(folder / "results.db") as store:
        write_task(store, begin_sweep(store), make_result())
    folder.chmod(0o555)
    with pytest.raises(StoreError, match=rf"the directory {folder} is read-only"):
        Store.open(folder / "results.db")
    with pytest.raises(StoreError, match="is read-only"):
        Store.open(folder / "another.db")
    with Store.open_readonly(folder / "results.db") as store:  # a colleague's results can be read
        assert len(queries.results(store)) == 2


def test_a_sweep_that_fills_a_store_in_a_read_only_directory(ordinary_user):
    """Without a log beside it SQLite can only read such a file as one that never changes."""
    path = ordinary_user / "results.db"

    def fill(name):
        ordinary_user.chmod(0o755)
        with Store.open(path) as store:
            sweep = begin_sweep(store)
            for number in range(100):
                write_task(store, sweep, make_result(f"{name}-{number}"))
        ordinary_user.chmod(0o555)

    def read_during(happening):
        with store.reading() as connection:
            connection.scalar(text("SELECT count(*) FROM cells"))
            happening()
            connection.execute(text("SELECT * FROM records")).all()

    fill("a")
    with Store.open_readonly(path) as store:
        assert len(queries.results(store)) == 200
        fill("b")
        assert len(queries.results(store)) == 400
        with pytest.raises(StoreError, match="changed while it was read; run the same command again"):
            read_during(lambda: fill("c"))
        assert len(queries.results(store)) == 600


def test_a_read_only_file(ordinary_user):
    path = ordinary_user / "results.db"
    Store.open(path).close()
    path.chmod(0o444)
    with pytest.raises(StoreError, match="is read-only"):
        Store.open(path)
    Store.open_readonly(path).close()
    path.chmod(0)
    with pytest.raises(StoreError, match="cannot be read: Permission denied"):
        Store.open_readonly(path)


def test_read_only_means_it(path):
    with Store.open(path) as store:
        write_task(store, begin_sweep(store), make_result())
        before = queries.results(store)
    with Store.open_readonly(path) as store:
        with pytest.raises(StoreError, match="is open read-only"):
            write_task(store, 1, make_result("cell-b"))
        for statement in ("DELETE FROM cells", "DROP TABLE cells", "CREATE TABLE x (y)"):
            with pytest.raises(StoreError, match="read-only"), store.reading() as connection:
                connection.execute(text(statement))
        with store.engine.connect() as connection:  # the file itself is open read-only too
            connection.execute(text("PRAGMA query_only = OFF"))
            with pytest.raises(OperationalError, match="readonly database"):
                connection.execute(text("DELETE FROM cells"))
        assert queries.results(store).equals(before)


def test_a_reader_sees_what_a_writer_adds(store, target):
    sweep = begin_sweep(store)
    with Store.open_readonly(target) as reader:
        for number in range(1, 4):
            write_task(store, sweep, make_result(f"cell-{number}"))
            assert queries.results(reader)["cell"].nunique() == number


# --- versions ---------------------------------------------------------------------------------


def test_a_newer_store_is_refused_and_left_alone(path, newer_harness, monkeypatch):
    with monkeypatch.context():
        newer_harness()
        Store.open(path).close()
    monkeypatch.undo()
    before = path.read_bytes()
    for opener in (Store.open, Store.open_readonly):
        with pytest.raises(StoreError, match=rf"newer harness \(revision {LATER}, .* knows {REVISION}\)"):
            opener(path)
    assert path.read_bytes() == before


def test_an_older_store_is_migrated_after_a_backup(path, newer_harness):
    with Store.open(path) as store:
        write_task(store, begin_sweep(store), make_result())
        newer_harness()
        with pytest.raises(StoreError, match=rf"older version \(revision {REVISION}, .* migrates it"):
            Store.open_readonly(path)
        # The first store is still open, so the last rows are only in its write-ahead log.
        Store.open(path).close()
    backup = path.with_name(f"results.db.backup-{REVISION}")
    migrated, old = sqlite3.connect(path), sqlite3.connect(backup)
    assert migrated.execute("SELECT key, duration_s, colour FROM cells").fetchall() == [
        ("cell-a", 1.25, None)
    ]
    assert migrated.execute("SELECT count(*) FROM records").fetchone() == (2,), "nothing cascaded"
    assert old.execute("SELECT key, seconds FROM cells").fetchall() == [("cell-a", 1.25)]
    for connection in (migrated, old):
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()
    Store.open(path).close()
    assert len(list(path.parent.glob("*.backup-*"))) == 1, "a migrated store is not backed up again"


def test_a_store_of_the_first_revision_keeps_its_rows_and_gets_kernels(path):
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        migrations.upgrade(connection, "0001")
    with engine.begin() as connection:
        for statement in FIRST_ROWS:
            connection.execute(text(statement))
    engine.dispose()
    with pytest.raises(StoreError, match=r"older version \(revision 0001"):
        Store.open_readonly(path)
    with Store.open(path) as store:
        assert store.records(1)["decode_latency"].value == 0.25
        assert store.kernels(1) == ()
        kernel = KernelUse("decode", "_gemv_kernel", "gemm", 3, 0.5, 1.0)
        cell = store.write_cell(
            1, make_result("cell-b", "v", kernels=(kernel,)), kind=CellKind.SCENARIO, task=None, scenario="s"
        )
        assert store.kernels(cell) == (kernel,)
    old = sqlite3.connect(path.with_name("results.db.backup-0001"))
    assert old.execute("SELECT value FROM records").fetchall() == [(0.25,)]
    assert old.execute("SELECT count(*) FROM sqlite_master WHERE name = 'kernels'").fetchone() == (0,)
    old.close()


def test_a_migration_that_breaks_changes_nothing(path, newer_harness):
    with Store.open(path) as store:
        write_task(store, begin_sweep(store), make_result())
    newer_harness(NEXT + '    op.execute("SELECT nonsense")\n')
    for _ in range(2):
        with pytest.raises(StoreError, match="no such column: nonsense"):
            Store.open(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT key, seconds FROM cells").fetchall() == [("cell-a", 1.25)]
    assert connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone() == (REVISION,)
    connection.close()
    names = sorted(file.name for file in path.parent.glob("*.backup-*"))
    first = f"results.db.backup-{REVISION}"
    assert names == [first, f"{first}-2"], "none was overwritten"


def test_the_schema_has_an_index_for_every_foreign_key_that_is_searched(store):
    inspector = inspect(store.engine)
    indexed = {
        (table, index["column_names"][0])
        for table in inspector.get_table_names()
        for index in inspector.get_indexes(table)
    }
    assert {("cells", "key"), ("cells", "variant_id"), ("records", "cell_id"),
            ("sweep_cells", "cell_id")} <= indexed  # fmt: skip


def test_the_next_migration_is_written_from_the_difference(newer_harness, monkeypatch):
    import sqlalchemy as sa

    from harness.store import tables
    from harness.store.migrations.__main__ import write_next

    folder = newer_harness()
    (folder / "versions" / f"{LATER}_next.py").unlink()
    changed = sa.MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.tables.values():
        table.to_metadata(changed)
    changed.tables["sweeps"].append_column(sa.Column("mood", sa.Text))
    monkeypatch.setattr(tables, "metadata", changed)
    path = write_next("add a mood")
    assert path.name == f"{LATER}_add_a_mood.py"
    script = path.read_text()
    assert f"revision = '{LATER}'" in script
    assert f"down_revision = '{REVISION}'" in script
    assert "batch_op.add_column(sa.Column('mood', sa.Text(), nullable=True))" in script
    assert "drop" not in script
