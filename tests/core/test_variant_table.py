"""The table of ``harness results``: what is apart stays apart, and says so."""

from __future__ import annotations

import json

import pytest

from harness.cli.app import run
from harness.evaluate.paired import benjamini_hochberg
from harness.records import Record
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, around, timed

SHAPE = "b1-p8-g2"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with Store.open(path) as store:
        yield store


@pytest.fixture
def results(path, capsys):
    def run_it(*arguments):
        capsys.readouterr()
        assert run(["results", "--db", str(path), *arguments]) == 0
        return capsys.readouterr().out

    return run_it


def header(text):
    return next(line for line in text.splitlines() if "method" in line)


def test_alike_rows_have_no_footnote(store, results):
    for _ in range(2):
        sweep = add_sweep(store)
        for method in ("baseline", "new"):
            add_cell(store, sweep, method, timed("decode_latency", around(0.01)), scenario=SHAPE)
    assert "!" not in results()


def test_a_cache_is_told_in_bytes(store, results):
    record = Record("kv_cache_bytes_per_token", 524288.0, "B/token")
    add_cell(store, add_sweep(store), "baseline", record, scenario=SHAPE)
    assert "524.3 kB" in results()


def test_rows_of_other_devices_versions_and_modes_are_named(store, results):
    first, second = add_sweep(store), add_sweep(store, versions={"torch": "2.12"}, gpu={"driver": "590"})
    add_cell(store, first, "baseline", timed("decode_latency", around(0.01)), scenario=SHAPE)
    record = timed("decode_latency", around(0.01), mode="eager")
    add_cell(store, second, "new", record, scenario=SHAPE, device_name="another GPU")
    notes = [line for line in results().splitlines() if line.startswith("!")]
    assert notes == [
        "! m: not comparable in timing, device is a GPU: baseline; another GPU: new",
        "! m: not comparable in timing, torch version is 2.11: baseline; 2.12: new",
        "! m: not comparable in timing, driver is 580.1: baseline; 590: new",
        f"! m {SHAPE}: not comparable in decode/token, taken as graph: baseline; eager: new",
    ]


def test_tasks_are_not_held_against_each_other(store, results):
    sweep = add_sweep(store, workload={"tasks": {"grammar": "r1", "kjv": "r2"}})
    for task in ("grammar", "kjv"):
        add_cell(store, sweep, "baseline", Record("acc", 0.5, "fraction"), task=task)
    text = results()
    assert "!" not in text
    assert "grammar accuracy" in header(text)
    assert "kjv accuracy" in header(text)


def test_two_versions_of_a_variant_are_two_rows(store, results):
    for version, seconds in (("2.11", 0.010), ("2.12", 0.020)):
        sweep = add_sweep(store, versions={"torch": version})
        record = timed("decode_latency", around(seconds))
        add_cell(store, sweep, "new", record, scenario=SHAPE, key=f"new on {version}")
    text = results()
    assert sum("new" in line and SHAPE in line for line in text.splitlines()) == 2
    assert "torch version is 2.11: new; 2.12: new" in text


def test_a_cell_measured_again_shows_the_newer_value(store, results):
    for value in (0.25, 0.75):
        add_cell(store, add_sweep(store), "new", Record("acc", value, "fraction"), task="grammar")
    assert "0.75" in results()
    assert "0.25" not in results()


def test_arrows_are_adjusted_over_the_whole_table(store, results):
    sweep = add_sweep(store)
    raw = [0.01, 0.02, 0.04, 0.2]
    for number, p in enumerate(raw):
        add_cell(
            store, sweep, f"m{number}", Record("acc", 0.5, "fraction"),
            Record("acc_difference", -0.1 if number else 0.1, "fraction"), Record("acc_difference_p", p, "p"),
            task="grammar",
        )  # fmt: skip
    text = results()
    assert [p < 0.05 for p in benjamini_hochberg(raw)] == [True, True, False, False]
    lines = {word: line for line in text.splitlines() for word in line.split()[1:2]}
    assert "0.5 ▲" in lines["m0"]
    assert "0.5 ▼" in lines["m1"]
    assert "▼" not in lines["m2"], "0.04 is below 0.05, but not among four tests"
    assert "▲ ▼ better or worse than the baseline: paired, 4 tests" in text


def test_percentiles_come_from_the_raw_readings(store, results):
    samples = [float(n) for n in range(1, 102)]
    add_cell(store, add_sweep(store), "new", timed("decode_latency", samples), scenario=SHAPE)
    (row,) = json.loads(results("--percentiles", "--format", "json"))
    assert [row[name] for name in ("p10", "p50", "p90", "p99")] == [11.0, 51.0, 91.0, 100.0]
    assert "p99" in header(results("--records", "--percentiles"))
    assert results("--percentiles", "--format", "csv").splitlines()[0].endswith("p10,p50,p90,p99")


def test_json_says_which_rows_go_together(store, results):
    sweeps = [add_sweep(store), add_sweep(store), add_sweep(store, gpu={"driver": "590"})]
    for sweep, method in zip(sweeps, "abc", strict=True):
        records = timed("decode_latency", around(0.01)), Record("weight_bytes", 1.0, "B")
        add_cell(store, sweep, method, *records, scenario=SHAPE)
    rows = json.loads(results("--format", "json"))
    of = {(row["method"], row["metric"]): row["conditions"] for row in rows}
    times = [of[method, "decode_latency"] for method in "abc"]
    assert times[0] == times[1] != times[2]
    assert len({of[method, "weight_bytes"] for method in "abc"}) == 1, "a driver weighs nothing"
