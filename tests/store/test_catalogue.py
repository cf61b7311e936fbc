"""What was measured stands in the catalogue, whichever way it came into the store."""

from __future__ import annotations

import sqlite3

import pytest
from sqlalchemy import delete, select, text, true

from harness.records import Record
from harness.store.catalogue import Entry, add_to_catalogue, item_limits, measured_in
from harness.store.store import Store
from harness.store.tables import VERSION_TABLE, catalogue
from tests.core.stores import add_cell, add_sweep
from tests.store.test_exchange import fill as measured

NOTE = "seq_len=128, windows=9, dropped_tokens=0"


def entries(store):
    with store.reading() as connection:
        found = {Entry(*row) for row in connection.execute(select(catalogue))}
        assert found == measured_in(connection, true())
        return found


def fill(store):
    whole, limited = add_sweep(store), add_sweep(store, config={"limit": 10})
    add_cell(store, whole, "rtn", Record("transform_s", 1.0, "s"))
    add_cell(store, whole, "rtn", Record("decode_latency", 1.0, "s", note=NOTE), scenario="b1-p1-g1")
    add_cell(store, whole, "rtn", Record("token_perplexity", 9.0, "ppl", note=NOTE), task="kjv")
    add_cell(store, whole, "gptq", Record("token_perplexity", 8.0, "ppl", note=NOTE), task="kjv")
    return add_cell(store, limited, "rtn", Record("acc", 0.5, "fraction"), task="grammar")


EXPECTED = {
    Entry("m", "transform", "transform", "transform_s", "s", 0, ""),
    Entry("m", "scenario", "b1-p1-g1", "decode_latency", "s", 0, ""),
    Entry("m", "task", "kjv", "token_perplexity", "ppl", 0, "seq_len=128, windows=9"),
    Entry("m", "task", "grammar", "acc", "fraction", 10, ""),
}


def test_what_a_sweep_writes(store):
    cell = fill(store)
    assert entries(store) == EXPECTED
    store.write_derived(cell, [Record("acc_flips", 0.1, "fraction")])
    assert entries(store) == EXPECTED | {Entry("m", "task", "grammar", "acc_flips", "fraction", 10, "")}


def test_what_is_inserted_in_bulk(store):
    fill(store)
    with store.writing() as connection:
        connection.execute(delete(catalogue))
        add_to_catalogue(connection, None)
        assert item_limits(connection) == {2: 10}
        assert item_limits(connection, [1]) == {}
    assert entries(store) == EXPECTED


def test_what_is_imported(tmp_path, monkeypatch):
    from harness.cli.app import run

    monkeypatch.chdir(tmp_path)
    with Store.open("theirs.db") as store:
        measured(store)
        expected = entries(store)
    assert expected
    assert run(["results", "export", "theirs.jsonl", "--db", "theirs.db"]) == 0
    assert run(["results", "import", "theirs.jsonl", "--db", "ours.db"]) == 0
    with Store.open_readonly("ours.db") as store:
        assert entries(store) == expected


def test_what_a_store_of_an_older_version_holds(tmp_path):
    """A store of revision 0003, which had no catalogue, is looked through once."""
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        fill(store)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE catalogue")
        for index in (
            "variants_family_model",
            "cells_kind_task_scenario_variant_id",
            "cells_status_variant_id",
        ):
            connection.execute(f"DROP INDEX ix_{index}")
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '0003'")
    connection.close()
    with Store.open(path) as store:
        assert entries(store) == EXPECTED


@pytest.mark.parametrize("written", [True, False])
def test_it_is_written_with_the_records_or_not_at_all(store, written, monkeypatch):
    sweep = add_sweep(store)
    if not written:
        monkeypatch.setattr("harness.store.store.add_to_catalogue", fail)
        with pytest.raises(RuntimeError):
            add_cell(store, sweep, "rtn", Record("acc", 0.5, "fraction"), task="t")
    else:
        add_cell(store, sweep, "rtn", Record("acc", 0.5, "fraction"), task="t")
    with store.reading() as connection:
        assert connection.scalar(text("SELECT count(*) FROM records")) == int(written)
    assert len(entries(store)) == int(written)


def fail(*_arguments):
    raise RuntimeError("the power is cut")
