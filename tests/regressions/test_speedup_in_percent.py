""" "+33.89 %" for a 2.95x speed-up: the inverse of a ratio read as a gain."""

from __future__ import annotations

import json

import pytest

from harness.cli.app import run
from harness.comparing import compare_methods
from harness.measure.statistics import speedup
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, around, timed


@pytest.fixture
def path(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for method, seconds in (("baseline", 2.95), ("new", 1.0)):
            latency = timed("decode_latency", around(seconds))
            throughput = timed("decode_throughput", around(1 / seconds), "tokens/s")
            add_cell(store, sweep, method, latency, throughput, scenario="b1-p8-g2")
    return tmp_path / "results.db"


def test_it_is_2_95_times_as_fast_by_time_and_by_throughput(path, capsys):
    with Store.open_readonly(path) as store:
        rows = {row.metric: row for row in compare_methods(store, "baseline", "new")}
    assert rows["decode_latency"].ratio == pytest.approx(1 / 2.95, rel=0.01)
    assert rows["decode_throughput"].ratio == pytest.approx(2.95, rel=0.01)
    assert {row.verdict for row in rows.values()} == {"2.95x faster"}
    assert speedup(2.95, 1.0) == pytest.approx(2.95)
    assert run(["compare", "baseline", "new", "--db", str(path)]) == 0
    table = capsys.readouterr().out
    assert "2.95x faster" in table
    assert "%" not in table
    assert "33.9" not in table


def test_the_other_way_round_it_is_2_95_times_slower(path):
    with Store.open_readonly(path) as store:
        (row, _) = compare_methods(store, "new", "baseline")
    assert row.verdict == "2.95x slower"


def test_json_has_the_ratio_and_no_percentage(path, capsys):
    assert run(["compare", "baseline", "new", "--db", str(path), "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["ratio"] == pytest.approx(0.339, abs=0.005)
    assert not any("percent" in name for name in row)
