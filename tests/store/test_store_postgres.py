"""What only a server has: several writers at a time, restarts, passwords, read-only transactions."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from sqlalchemy import create_engine, event, func, select, text

from harness.errors import MissingExtra, StoreError
from harness.records import ModuleEffect, Record, VariantReport
from harness.store import exchange_import, opening, queries
from harness.store.exchange_sources import read_source
from harness.store.failures import explain
from harness.store.opening import label, locate
from harness.store.store import Store
from harness.store.tables import effects, records
from tests.store.rows import begin_sweep, make_result, make_variant, write_task
from tests.store.server import PostgresServer


@pytest.fixture
def own_server(postgres_programs_folder):
    """A server that a test may stop."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = PostgresServer(postgres_programs_folder, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def at_once(*actions):
    """Run actions in threads that start together; what they raise is raised here."""
    barrier = threading.Barrier(len(actions))
    failures = []

    def run(action):
        try:
            barrier.wait()
            action()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- several writers ------------------------------------------------------------------------------------


@pytest.mark.postgres
def test_writers_at_once(url):
    def write(name):
        with Store.open(url) as store:
            sweep = begin_sweep(store)
            for number in range(10):
                store.write_variant(sweep, make_variant(f"variant-{number}"))
                write_task(store, sweep, make_result(f"{name}-{number}"))

    at_once(lambda: write("left"), lambda: write("right"))
    with Store.open_readonly(url) as store:
        assert queries.results(store)["cell"].nunique() == 20
        assert len(queries.variants(store)) == 11
        assert queries.sweeps(store)["machine"].unique().tolist() == [1]


@pytest.mark.postgres
def test_two_sweeps_that_find_the_same_effects_do_not_trip_over_each_other(url):
    with Store.open(url) as store:
        begin_sweep(store)

        def write(kind):
            with Store.open(url) as mine:
                found = tuple(ModuleEffect(f"m{n}", kind, True, "int8", 1, 4, 1) for n in range(5))
                for _ in range(15):
                    mine.write_effects("variant-a", VariantReport("variant-a", found))

        at_once(lambda: write("A"), lambda: write("B"))
        with store.reading() as connection:
            kinds = set(connection.scalars(select(effects.c.kind)))
            assert connection.scalar(select(func.count()).select_from(effects)) == 5
        assert kinds in ({"A"}, {"B"}), "one sweep's effects, whole"


@pytest.mark.postgres
def test_two_sweeps_that_compare_the_same_cell_leave_one_record(url):
    with Store.open(url) as store:
        cell = write_task(store, begin_sweep(store), make_result())

        def compare():
            store.write_derived(cell, [Record("flips", 0.5, "fraction", samples=(1.0,) * 500)])

        for _ in range(10):
            at_once(compare, compare, compare)
            with store.reading() as connection:
                metrics = list(connection.scalars(select(records.c.metric)))
            assert sorted(metrics) == ["acc", "flips", "latency"]


@pytest.mark.postgres
def test_an_import_and_a_sweep_do_not_wait_for_each_other(url, tmp_path, monkeypatch):
    """Both are the first to measure two metrics, the import in two files and the other order."""
    read = []
    for name in ("z", "a"):
        with Store.open(tmp_path / f"{name}.db") as store:
            write_task(store, begin_sweep(store), make_result(records=(Record(name, 1.0, "s"),)))
        read += read_source(tmp_path / f"{name}.db")
    with Store.open(url) as store:
        sweep = begin_sweep(store)
        measured = make_result("measured", records=tuple(Record(name, 1.0, "s") for name in "az"))
        beside = ThreadPoolExecutor(1)
        cells = []
        add = exchange_import._add

        def add_while_a_cell_is_written(*arguments):
            added = add(*arguments)
            cells.append(beside.submit(write_task, store, sweep, measured))
            wait(cells, timeout=0.5)
            monkeypatch.setattr(exchange_import, "_add", add)
            return added

        monkeypatch.setattr(exchange_import, "_add", add_while_a_cell_is_written)
        assert [done.added for done in exchange_import.import_results(store, read)] == [1, 1]
        assert cells[0].result(timeout=10) is not None
        assert len(queries.results(store)) == 4


@pytest.mark.postgres
def test_two_processes_make_one_store(empty_url):
    stores = []
    at_once(*(lambda: stores.append(Store.open(empty_url)) for _ in range(3)))
    for store in stores:
        assert queries.sweeps(store).empty
        store.close()


# --- a server that goes away ----------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_restart_between_two_cells_is_not_noticed(own_server):
    with Store.open(own_server.url(own_server.new_database())) as store:
        sweep = begin_sweep(store)
        write_task(store, sweep, make_result("before"))
        own_server.stop("fast")
        restart = threading.Timer(1.0, own_server.start)
        restart.start()
        write_task(store, sweep, make_result("after"))  # waits until it is back
        restart.join()
        assert set(store.finished_cells(["before", "after"])) == {"before", "after"}


@pytest.mark.postgres
def test_a_restart_inside_a_cell_is_one_clear_line_and_leaves_no_half(own_server):
    with Store.open(own_server.url(own_server.new_database())) as store:
        sweep = begin_sweep(store)

        def restart(_connection, _cursor, statement, *_):
            if statement.startswith("INSERT INTO records"):
                own_server.stop("fast")
                own_server.start()

        event.listen(store.engine, "after_cursor_execute", restart)
        with pytest.raises(StoreError) as error:
            write_task(store, sweep, make_result())
        event.remove(store.engine, "after_cursor_execute", restart)
        assert "the connection to the server was lost (" in str(error.value)
        assert "run the same command again (every finished cell is kept)" in str(error.value)
        assert "\n" not in str(error.value)
        assert store.finished_cells(["cell-a"]) == {}
        write_task(store, sweep, make_result())
        assert len(queries.results(store)) == 2


@pytest.mark.postgres
def test_a_server_that_stays_away_ends_the_sweep_in_one_line(own_server, monkeypatch):
    with Store.open(own_server.url(own_server.new_database())) as store:
        sweep = begin_sweep(store)
        monkeypatch.setattr(opening, "RECONNECT_TIMEOUT_S", 0.6)
        own_server.stop("fast")
        try:
            with pytest.raises(StoreError, match="results store postgresql") as error:
                write_task(store, sweep, make_result())
        finally:
            own_server.start()
        assert "\n" not in str(error.value)
        write_task(store, sweep, make_result())


def test_errors_of_files_are_not_taken_for_lost_connections():
    assert explain(sqlite3.OperationalError("no such table: x")) == "no such table: x"


# --- what is there --------------------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_reader_cannot_write(url):
    with Store.open(url) as store:
        write_task(store, begin_sweep(store), make_result())
    with Store.open_readonly(url) as reader:
        assert len(queries.results(reader)) == 2
        with pytest.raises(StoreError, match="read-only transaction"), reader.reading() as connection:
            connection.execute(text("DELETE FROM samples"))
        with pytest.raises(StoreError, match="is open read-only"):
            write_task(reader, 1, make_result("b"))


@pytest.mark.postgres
def test_missing_empty_and_foreign_databases(empty_url):
    with pytest.raises(StoreError, match="does not exist"):
        Store.open(empty_url.replace("/store_", "/nowhere_"))
    with pytest.raises(StoreError, match="is empty; run: harness sweep"):
        Store.open_readonly(empty_url)
    engine = create_engine(locate(empty_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (x int)"))
    engine.dispose()
    with pytest.raises(StoreError, match=r"not a results store .*table 'mine'"):
        Store.open(empty_url)


# --- addresses and passwords ----------------------------------------------------------------------------


def test_the_driver_is_named():
    assert locate("postgres://me@host/db").drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    "address",
    [
        "postgres://me:s3cret@host/db",
        "postgresql://me:s3cret%40x@host/db?sslmode=require",
        "postgresql://me@host/db?password=s3cret",
    ],
)
def test_a_password_is_in_no_name(address):
    assert "s3cret" not in label(locate(address))


@pytest.mark.parametrize(
    "address",
    [
        "mysql://me:s3cret@host/db",
        "postgresql://me:s3cret@host:port/db",
        "postgresql+none://me:s3cret@host/db",
    ],
)
def test_a_password_is_in_no_complaint_about_an_address(address):
    with pytest.raises(StoreError) as error:
        Store.open(address)
    assert "s3cret" not in str(error.value)


def test_a_missing_driver_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"psycopg is not installed; .*\[postgres\]"):
        Store.open("postgresql://host/db")


def test_a_server_that_is_not_there(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="results store postgresql") as error:
        Store.open(f"postgresql://me:secret@/db?host={tmp_path}")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
