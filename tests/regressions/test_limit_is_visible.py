"""`--limit 10` published as evidence: a result with a limit says so wherever it is shown."""

from __future__ import annotations

import json

import pytest
from harness_dashboard.queries import columns

from harness.cli.app import run
from harness.comparing import compare_methods
from harness.records import Record
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, items

LIMIT = 10


@pytest.fixture
def path(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store, config={"limit": LIMIT})
        for method in ("baseline", "new"):
            records = [Record("acc", 1.0, "fraction", n=LIMIT, note=f"limit={LIMIT}")]
            add_cell(store, sweep, method, *records, task="grammar", items=items([1] * LIMIT))
    return tmp_path / "results.db"


def shown(path, capsys, *arguments):
    capsys.readouterr()
    assert run([*arguments, "--db", str(path)]) == 0
    return capsys.readouterr().out


def test_in_the_table_in_every_format_and_in_comparisons(path, capsys):
    assert "grammar accuracy (limit 10)" in shown(path, capsys, "results")
    for row in json.loads(shown(path, capsys, "results", "--format", "json")):
        assert row["limit"] == LIMIT
    for output in ("csv", "markdown"):
        lines = shown(path, capsys, "results", "--format", output).splitlines()
        column = lines[0].replace("|", ",").replace(" ", "").strip(",").split(",").index("limit")
        values = lines[-1].replace("|", ",").strip(",").split(",")
        assert values[column].strip() == str(LIMIT)
    assert "limit 10" in shown(path, capsys, "compare", "baseline", "new")
    (row,) = json.loads(shown(path, capsys, "compare", "baseline", "new", "--format", "json"))
    assert "limit 10" in row["flags"]


def test_in_the_dashboard(path):
    with Store.open_readonly(path) as store:
        assert {column.name for column in columns(store, None)} == {"acc · grammar (limit 10)"}


def test_ten_items_never_stand_in_one_column_with_all(path, capsys):
    with Store.open(path) as store:
        whole = add_sweep(store)
        record = Record("acc", 0.5, "fraction", n=40)
        add_cell(store, whole, "baseline", record, task="grammar", items=items([1, 0] * 20))
        assert {column.name for column in columns(store, None)} == {
            "acc · grammar",
            "acc · grammar (limit 10)",
        }
        # The variant was only measured on ten items, the baseline on both: the ten are compared.
        (row,) = compare_methods(store, "baseline", "new")
        assert (row.n, row.flags) == (LIMIT, ("limit 10",))
    text = shown(path, capsys, "results")
    assert "grammar accuracy " in text
    assert "grammar accuracy (limit 10)" in text
