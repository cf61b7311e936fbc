"""The Environment page: manifests, what tells sweeps apart, and the state of the store."""

from __future__ import annotations

import pytest
from sqlalchemy import insert

pytest.importorskip("streamlit")

from harness_dashboard import environment_data, store_health
from harness_dashboard.environment_data import SweepFacts

from harness.records import Record
from harness.store.store import Store
from harness.store.tables import REVISION, imports
from tests.core.stores import END, MANIFEST, add_cell, add_sweep
from tests.dashboard.filling import HOSTILE
from tests.dashboard.pages import draw, texts

SCORE = Record("acc", 0.5, "fraction")


def facts(sweep=1, end=END, config=None, **changes):
    start = dict(MANIFEST)
    for name, value in changes.items():
        start[name] = {**start.get(name, {}), **value} if isinstance(value, dict) else value
    return SweepFacts(sweep, "finished", "", "", "c", config or {}, start, end)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with Store.open(path) as store:
        yield store


# --- one manifest -----------------------------------------------------------------------------


def test_the_state_has_a_value_at_both_ends():
    end = {"gpu": {"sm_clock_mhz": 1965, "throttle_reasons": ["SwPowerCap"], "temperature_c": 71}}
    found = facts(end=end, gpu={"temperature_c": 35, "violation_s": {"thermal": 2.0}})
    rows = environment_data.manifest_table(found).set_index("what")
    assert rows.loc["temperature", ["at the start", "at the end"]].tolist() == ["35 °C", "71 °C"]
    assert rows.loc["what held the clocks down", "at the end"] == "SwPowerCap"
    assert rows.loc["time held down, by cause: thermal", "at the start"] == "2 s"
    assert rows.loc["driver", "at the end"] == ""  # did not change
    assert rows.loc["torch", "at the start"] == "2.11"
    assert rows.loc["power cap", "at the start"] == "700 W"


def test_work_data_seeds_and_ceilings():
    found = facts(
        config={"seeds": [0, 1], "limit": 10, "methods": [HOSTILE], "tasks": []},
        ceilings={
            "values": {"matmul_bfloat16": 7.5e14, "read": 2.9e12, "launch": 3e-6},
            "notes": ["no int8"],
        },
        ram_bytes=2**37,
        git={"commit": "abc", "dirty": True},
        environment={"OMP_NUM_THREADS": "2"},
    )
    rows = environment_data.manifest_table(found)
    shown = {(row["part"], row["what"]): row["at the start"] for row in rows.to_dict("records")}
    assert shown["asked for", "seeds"] == "0, 1"
    assert shown["asked for", "limit"] == "10"
    assert shown["asked for", "methods"] == HOSTILE
    assert ("asked for", "tasks") not in shown
    assert shown["ceilings", "matmul_bfloat16"] == "750 TFLOP/s"
    assert shown["ceilings", "read"] == "2.9 TB/s"
    assert shown["ceilings", "launch"] == "3 µs"
    assert shown["ceilings", "note"] == "no int8"
    assert shown["machine", "memory"] == "128 GiB"
    assert shown["code", "uncommitted changes"] == "yes"
    assert shown["data", "grammar"] == "rev-1"
    assert shown["run", "OMP_NUM_THREADS"] == "2"


def test_what_was_not_recorded_is_left_out():
    assert environment_data.manifest_table(SweepFacts(1, "running", "", None, "", {}, {}, None)).empty


# --- two sweeps -------------------------------------------------------------------------------


def test_only_what_differs_is_shown_with_what_it_means():
    other = facts(
        2, versions={"torch": "2.12"}, gpu={"driver": "590"}, hostname="b",
        workload={"jobs": 2, "tasks": {"grammar": "rev-2", "other": "x"}, "budget": {}},
    )  # fmt: skip
    found = environment_data.differing(facts(hostname="a"), other)
    rows = found.set_index("what")
    assert rows.columns.tolist() == ["sweep 1", "sweep 2", "matters for", "meaning"]
    assert rows["matters for"].to_dict() == {
        "torch version": "timing, memory, quality",
        "driver": "timing",
        "variants at a time": "timing",
        "task data: grammar": "quality",
        "hostname": "nothing",
    }
    assert rows.loc["driver", ["sweep 1", "sweep 2"]].tolist() == ["580.1", "590"]
    assert found["meaning"].all()


def test_every_condition_that_is_judged_is_explained():
    from harness.comparability import _FACTS

    exempt = {"dtype", "calibration budget", "training budget"}  # of variants, not of sweeps
    assert {fact.label for fact in _FACTS.values()} - exempt <= set(environment_data._MEANINGS)


def test_a_limit_matters_to_quality():
    found = environment_data.differing(facts(), facts(2, config={"limit": 10}))
    assert found[["what", "sweep 2", "matters for"]].values.tolist() == [["limit of items", "10", "quality"]]


def test_clocks_of_the_moment_are_no_difference():
    late = {**END, "time_utc": "2026-02-01T00:00:00+00:00"}
    found = environment_data.differing(facts(), facts(2, end=late, time_utc="2026-01-31T00:00:00+00:00"))
    assert found.empty


def test_warnings_are_about_the_sweeps_of_current_results(store):
    first, second = add_sweep(store), add_sweep(store)
    add_cell(store, first, "x", SCORE, task="a", key="x")
    add_cell(store, second, "y", SCORE, task="a", key="y")
    add_sweep(store, versions={"torch": "1.0"})  # measured nothing
    assert environment_data.comparability_warnings(store).empty
    for _ in range(3):
        sweep = add_sweep(store, versions={"torch": "2.12"})
        add_cell(store, sweep, f"z{sweep}", SCORE, task="a", key=f"z{sweep}")
    [row] = environment_data.comparability_warnings(store).to_dict("records")
    assert row["what"] == "torch version"
    assert row["values"] == "2.11 in sweeps 1, 2; 2.12 in sweeps 4 to 6"
    assert row["matters for"] == "timing, memory, quality"


# --- the store --------------------------------------------------------------------------------


def test_sizes_revision_and_rows(store, path):
    add_cell(store, add_sweep(store), "x", SCORE, SCORE, task="a", key="x")
    rows = store_health.health(store).set_index("what")["value"]
    assert rows["store"] == str(path)
    assert rows["revision"] == REVISION
    assert rows["file"].endswith("KiB")
    assert (rows["sweeps"], rows["cells"], rows["records"]) == ("1", "1", "2")
    counts = store_health.row_counts(store).set_index("table")["rows"]
    assert counts["records"] == 2
    assert counts["samples"] == 0
    assert store_health.fault_of(store) is None


def test_damage_is_found(store):
    sweep = add_sweep(store)
    add_cell(store, sweep, "x", SCORE, task="a", key="x")
    with store.writing() as connection:
        connection.exec_driver_sql("UPDATE cells SET status = 'nonsense'")
    assert "status" in store_health.fault_of(store)


def test_imports_and_their_origin(store):
    assert store_health.import_table(store).empty
    sweep = add_sweep(store)
    add_cell(store, sweep, "x", SCORE, task="a", key="x")
    with store.writing() as connection:
        row = {
            "sweep_id": sweep,
            "content_id": "c",
            "origin": HOSTILE,
            "imported_at": "2026-01-02T03:04:05.678",
        }
        connection.execute(insert(imports), row)
    [found] = store_health.import_table(store).to_dict("records")
    assert found == {
        "sweep": 1, "origin": HOSTILE, "imported at (UTC)": "2026-01-02 03:04:05", "cells": 1,
    }  # fmt: skip


# --- the page ---------------------------------------------------------------------------------


def test_the_page(store, path, monkeypatch):
    first = add_sweep(store)
    second = add_sweep(store, versions={"torch": HOSTILE})
    add_cell(store, first, "x", SCORE, task="a", key="x")
    add_cell(store, second, "y", SCORE, task="a", key="y")
    app = draw("environment", path, monkeypatch)
    warned, manifest, differing, health = (app.dataframe[place].value for place in range(4))
    assert warned["what"].tolist() == ["torch version"]
    assert HOSTILE in manifest["at the start"].tolist()
    assert differing["what"].tolist() == ["torch version"]
    assert "revision" in health["what"].tolist()
    assert app.warning[1].value == "1 of these keep results of the two sweeps from being compared."
    for each in texts(app):
        assert "<img" not in each
    app.button[-1].click().run()
    assert "No damage was found." in [each.value for each in app.success]


def test_parts_and_sweeps_come_from_the_address(store, path, monkeypatch):
    for _ in range(3):
        add_cell(store, (sweep := add_sweep(store)), f"x{sweep}", SCORE, task="a", key=f"x{sweep}")
    app = draw("environment", path, monkeypatch, sweep="2", against="1", part=["versions", "data"])
    assert app.subheader[1].value == "Manifest of sweep 2"
    assert set(app.dataframe[0].value["part"]) == {"versions", "data"}
    assert "Yes: the sweeps behind" in app.success[0].value
    assert app.success[1].value == "Nothing that is recorded differs."


def test_an_empty_store_has_a_state_too(store, path, monkeypatch):
    app = draw("environment", path, monkeypatch)
    assert app.info[0].value == "The store has no results yet."
    assert app.dataframe[0].value.set_index("what").at["revision", "value"] == REVISION
