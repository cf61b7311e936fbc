"""The same store in PostgreSQL, by URL."""

from __future__ import annotations

import math
import threading

import pytest
from sqlalchemy import create_engine, text

from harness.errors import MissingExtra, StoreError
from harness.records import Item, ModuleEffect, Record, VariantReport
from harness.store import queries
from harness.store.opening import locate
from harness.store.store import Store
from harness.store.tables import VERSION_TABLE, metadata
from tests.store.rows import begin_sweep, make_result, make_variant, write_task


@pytest.fixture
def url(postgres_server):
    return postgres_server


@pytest.fixture
def server_store(url):
    with Store.open(url) as store:
        yield store
        with store.engine.begin() as connection:
            metadata.drop_all(connection)
            connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))


@pytest.mark.postgres
def test_a_round_trip(server_store, url):
    sweep = begin_sweep(server_store)
    result = make_result(
        records=(
            Record("nan", math.nan, "x", upper=math.inf, samples=(math.nan, 1.0)),
            Record("acc", 0.5, "fraction", n=2),
        ),
        items=(Item(0, "acc", 1.0, {"ll": [-math.inf]}), Item(1, "acc", math.nan)),
        log_tail="a\0b",
    )
    cell = write_task(server_store, sweep, result)
    effect = ModuleEffect("a", "Linear", True, "int8", 2**33, 2**35, 2**33)
    server_store.write_effects("variant-a", VariantReport("variant-a", (effect,)))
    server_store.link_cells(begin_sweep(server_store), [cell])
    server_store.close_sweep(sweep, "finished")
    with Store.open_readonly(url) as reader:
        frame = queries.results(reader, sweep="last", methods=["gptq"], statuses=["ok"])
        assert frame["metric"].tolist() == ["nan", "acc"]
        assert math.isnan(frame.value[0])
        assert frame.upper[0] == math.inf
        assert reader.items(cell)[0] == Item(0, "acc", 1.0, {"ll": [-math.inf]})
        assert queries.samples(reader, [1])["value"].tolist()[1] == 1.0
        assert len(queries.paired_items(reader, cell, cell, "acc")) == 2
        assert queries.variants(reader)["bytes_before"].tolist() == [2**35]
        assert queries.sweeps(reader)["cells_ok"].tolist() == [1, 1]
        assert queries.failures(reader).empty
        with (
            pytest.raises(StoreError, match="read-only transaction"),
            reader.reading() as connection,
        ):
            connection.execute(text("DELETE FROM samples"))


@pytest.mark.postgres
def test_migrations_build_the_tables_there_too(server_store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with server_store.reading() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []


@pytest.mark.postgres
def test_writers_at_once(server_store, url):
    sweep = begin_sweep(server_store)
    failures = []

    def write(name):
        try:
            with Store.open(url) as store:
                for number in range(10):
                    store.write_variant(sweep, make_variant(f"variant-{number}"))
                    write_task(store, sweep, make_result(f"{name}-{number}"))
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert queries.results(server_store)["cell"].nunique() == 20
    assert len(queries.variants(server_store)) == 11


@pytest.mark.postgres
def test_missing_empty_and_foreign_databases(url):
    with pytest.raises(StoreError, match="does not exist"):
        Store.open(url.replace("/postgres?", "/nowhere?"))
    with pytest.raises(StoreError, match="is empty; run: harness sweep"):
        Store.open_readonly(url)
    engine = create_engine(locate(url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (x int)"))
    with pytest.raises(StoreError, match=r"not a results store .*table 'mine'"):
        Store.open(url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE mine"))
    engine.dispose()


def test_the_driver_is_named():
    assert locate("postgres://me:secret@host/db").drivername == "postgresql+psycopg"
    assert "secret" not in str(locate("postgresql://me:secret@host/db"))


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
