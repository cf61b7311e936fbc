"""Reading a store that is damaged in any way: the rows, or one clear error."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import strategies as st

from harness.store.store import Store
from tests.dashboard.filling import fill
from tests.fuzz.exploring import examples, explore, run_cleanly

DB = Path("results.db")
VERBS = (
    ["results"],
    ["results", "--format", "json"],
    ["results", "--sweep", "last", "--format", "csv", "--records"],
    ["results", "export", "out.jsonl"],
    ["compare", "baseline", "rtn"],
    ["choose"],
    ["why"],
    ["scaling"],
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "results.db"
    with Store.open(path) as store:
        fill(store)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    return path.read_bytes()


def _read(data, verb):
    for beside in Path().glob("results.db*"):
        beside.unlink()
    Path("out.jsonl").unlink(missing_ok=True)
    DB.write_bytes(data)
    code, *_ = run_cleanly(verb)
    return code


def test_the_sound_store_reads(sound):
    for verb in VERBS[:4]:
        assert _read(sound, verb) == 0


@examples
def test_flipped_and_cut_bytes(sound, count):
    flips = st.lists(st.tuples(st.integers(0, len(sound) - 1), st.integers(1, 255)), min_size=1, max_size=40)
    cuts = st.none() | st.integers(0, len(sound))
    zeroed = st.none() | st.integers(0, len(sound) // 4096 - 1)

    def holds(damage):
        changes, cut, page, verb = damage
        data = bytearray(sound)
        for place, change in changes:
            data[place] ^= change
        if page is not None:
            data[page * 4096 : (page + 1) * 4096] = bytes(4096)
        _read(bytes(data[:cut]), verb)

    explore(st.tuples(flips, cuts, zeroed, st.sampled_from(VERBS)), holds, count)


def _columns(sound):
    DB.write_bytes(sound)
    with sqlite3.connect(DB) as connection:
        tables = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        found = [
            (table, row[1]) for table in tables for row in connection.execute(f"PRAGMA table_info({table})")
        ]
    connection.close()
    return [(table, column) for table, column in found if not table.startswith("sqlite_")]


@examples
def test_values_that_no_column_should_hold(sound, count):
    values = st.one_of(
        st.none(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.binary(max_size=8),
        st.text(max_size=8),
        st.sampled_from(
            ["[", "{}", "[]", "null", '{"a": 1}', '[{"options": 5}]', '[{"name": "x"}]', "nope", "9" * 400]
        ),
    )
    places = st.lists(st.tuples(st.sampled_from(_columns(sound)), values), min_size=1, max_size=3)

    def holds(damage):
        changes, verb = damage
        DB.write_bytes(sound)
        with sqlite3.connect(DB) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute("PRAGMA writable_schema = ON")
            # Nothing is NOT NULL or unique any more.
            connection.execute(
                "UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '') WHERE type = 'table'"
            )
            connection.commit()
        connection.close()
        with sqlite3.connect(DB) as connection:
            for (table, column), value in changes:
                try:
                    connection.execute(f'UPDATE OR IGNORE "{table}" SET "{column}" = ?', (value,))
                except (sqlite3.Error, UnicodeEncodeError):
                    continue
        connection.close()
        data = DB.read_bytes()
        _read(data, verb)

    explore(st.tuples(places, st.sampled_from(VERBS)), holds, count)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize(
    "table", ["cells", "records", "variants", "sweeps", "machines", "items", "samples", "sweep_cells"]
)
def test_a_table_that_is_gone(sound, table, verb):
    DB.write_bytes(sound)
    with sqlite3.connect(DB) as connection:
        connection.execute(f"DROP TABLE {table}")
    connection.close()
    _read(DB.read_bytes(), verb)


def test_what_is_no_store(sound):
    for content in (b"", b"x", b"SQLite format 3\0", b"SQLite format 3\0" + b"\0" * 4080, sound[:4096]):
        for verb in VERBS:
            assert _read(content, verb) == 2
