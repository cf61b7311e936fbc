"""Results as text: what is exported is what is imported, wherever, and nothing is overwritten."""

from __future__ import annotations

import gzip
import json
import math
import os

import pytest
from sqlalchemy import func, select

from harness.errors import ConfigError, StoreError, UnknownName
from harness.records import CellKind, Item, KernelUse, ModuleEffect, Record, Status, VariantReport
from harness.store import queries
from harness.store.durations import durations
from harness.store.exchange_export import Wanted, export_results
from harness.store.exchange_import import import_results
from harness.store.exchange_layout import sections
from harness.store.exchange_read import read_results
from harness.store.store import Store
from harness.store.tables import imports, metadata
from tests.store.rows import begin_sweep, make_result, make_variant, write_task

HOST = "gpu-box-17"
MANIFEST = {
    "time_utc": "2026-01-02T03:04:05+00:00",
    "measuring_version": 2,
    "command": ["/home/jane/venv/bin/harness", "sweep"],
    "hostname": HOST,
    "device": "cpu",
    "device_name": "a processor",
    "cpu": "a processor",
    "process": {"pid": 7, "boot": "b"},
    "versions": {"torch": "2.11", "triton": None},
    "gpu": {"driver": "580", "sm_clock_mhz": 1980, "uuid": "GPU-1234"},
    "environment": {"HF_HOME": "/home/jane/hf"},
}


def fill(store):
    """Two sweeps: the second measures one cell anew, uses one of the first, and fails in one."""
    first = begin_sweep(
        store,
        make_variant("base", method="baseline", chain=[{"name": "baseline", "options": {}}]),
        make_variant(),
        command=f"harness sweep --db /home/jane/x.db --text /home/jane/books/kjv.txt --plugin ./p.py {HOST}",
        config={"methods": ["gptq"], "text": "/home/jane/books/kjv.txt", "limit": None},
        manifest={**MANIFEST, "sweep_uid": "first"},
    )
    effects = [
        ModuleEffect(f"layers.{n}.up", "Linear", True, "int4", 64, 256, 40, 4.25 + n, 0.1, None, True, "k")
        for n in range(11)
    ]
    store.write_effects("variant-a", VariantReport("variant-a", tuple(effects), simulated=True))
    store.write_cell(
        first, make_result("t", "base", items=()), kind=CellKind.TRANSFORM, task=None, scenario=None
    )
    kept = write_task(store, first, make_result("base-task", "base"))
    write_task(store, first, make_result("task", records=(), items=(), status=Status.OOM, reason="first try"))
    odd = make_result(
        "speed",
        records=(
            Record("nan", math.nan, "x", lower=-math.inf, upper=math.inf, samples=(math.nan, 0.1 + 0.2)),
            Record("second", 1e-300, "s", n=2**40, mode="graph, paired", note=f"on {HOST} in /home/jane/x/y"),
        ),
        items=(),
        kernels=(
            KernelUse("decode", "gemv<bf16>", "gemm", 3, 0.5, 1.0),
            KernelUse("prefill", "a", "b", 1, 1, 1),
        ),
    )
    store.write_cell(first, odd, kind=CellKind.SCENARIO, task=None, scenario="b8-p128-g64")
    store.close_sweep(first, "finished", {**MANIFEST, "time_utc": "2026-01-02T04:04:05+00:00"})

    second = begin_sweep(store, config={"methods": ["gptq"]}, manifest={**MANIFEST, "sweep_uid": "second"})
    store.link_cells(second, [kept])
    items = (
        Item(0, "nll", math.inf, {"ll": [-math.inf, 1.5], "text": "ünï\u2028\ud83d\ude00"}),
        Item(1, "nll", math.nan),
    )
    write_task(store, second, make_result("task", items=items, seconds=2))
    failed = make_result(
        "failed", records=(), items=(), status=Status.FAILED,
        reason=f"OSError: cannot read '/home/jane/models/x.bin' on {HOST}",
        traceback='File "/home/jane/x.py"', log_tail="secret words",
    )  # fmt: skip
    store.write_cell(second, failed, kind=CellKind.SCENARIO, task=None, scenario="b1-p128-g64")
    return first, second


def export(store, file, leave_out=(), with_host=False, **wanted):
    export_results(store, file, Wanted(**wanted), leave_out=leave_out, with_host=with_host)
    return file.read_bytes()


def import_(store, *files, origin=None):
    return import_results(store, [read_results(file) for file in files], origin)


def counts(store):
    with store.reading() as connection:
        return {
            table.name: connection.scalar(select(func.count()).select_from(table))
            for table in metadata.sorted_tables
        }


@pytest.fixture
def filled(tmp_path):
    with Store.open(tmp_path / "measured.db") as opened:
        fill(opened)
        yield opened


@pytest.fixture
def file(filled, tmp_path):
    export(filled, tmp_path / "rows.jsonl")
    return tmp_path / "rows.jsonl"


# --- there and back -----------------------------------------------------------------------------------


def test_every_table_is_exported():
    assert {*sections(), "sweep_cells", "imports", "catalogue"} == set(metadata.tables)


@pytest.mark.parametrize("sweep", [None, 1, 2, "last"])
def test_export_import_export_is_the_same_bytes_in_both_databases(filled, store, tmp_path, sweep):
    first = export(filled, tmp_path / "a.jsonl", sweep=sweep)
    import_(store, tmp_path / "a.jsonl")
    assert export(store, tmp_path / "b.jsonl") == first
    rows, again = (queries.results(each, sweep=s) for each, s in ((filled, sweep), (store, None)))
    what = ["model", "method", "task", "scenario", "status", "metric", "value", "lower", "upper", "n"]
    order = ["method", "task", "scenario", "metric"]
    left, right = (each.sort_values(order)[what].reset_index(drop=True) for each in (rows, again))
    assert left.equals(right)


def test_from_one_database_to_the_other_and_back(filled, store, tmp_path):
    text = export(filled, tmp_path / "a.jsonl")
    import_(store, tmp_path / "a.jsonl")
    with Store.open(tmp_path / "back.db") as back:
        export(store, tmp_path / "b.jsonl.gz")
        import_(back, tmp_path / "b.jsonl.gz")
        assert export(back, tmp_path / "c.jsonl") == text
        assert counts(back) == counts(store)


def test_all_that_hangs_on_a_cell_comes_along(file, store):
    import_(store, file)
    found = counts(store)
    expected = {"sweeps": 2, "variants": 2, "cells": 5, "effects": 11, "kernels": 2, "samples": 11}
    assert {name: found[name] for name in expected} == expected
    frame = queries.results(store)
    speed = frame[frame.scenario == "b8-p128-g64"].set_index("metric")
    assert math.isnan(speed.value["nan"])
    assert (speed.lower["nan"], speed.upper["nan"]) == (-math.inf, math.inf)
    assert (speed.value["second"], speed.n["second"]) == (1e-300, 2**40)
    is_task = (frame.task == "hellaswag") & (frame.method != "baseline")
    task = int(frame[is_task]["cell"].iloc[0])
    assert store.items(task)[0] == Item(0, "nll", math.inf, {"ll": [-math.inf, 1.5], "text": "ünï\u2028😀"})
    cell = int(speed["cell"].iloc[0])
    assert [kernel.name for kernel in store.kernels(cell)] == ["a", "gemv<bf16>"]
    variant = int(speed["variant"].iloc[0])
    effects = queries.effects(store, variant)
    assert effects["stored_bits_per_weight"].tolist() == [4.25 + n for n in range(11)]
    assert queries.sweeps(store)["cells"].tolist() == [3, 3], "the cell that was used again is in both"


def test_parts_can_be_left_out(filled, tmp_path):
    text = export(filled, tmp_path / "a.jsonl", leave_out=("samples", "items", "effects", "kernels")).decode()
    header = json.loads(text.splitlines()[0])
    assert header["left_out"] == ["effects", "items", "kernels", "samples"]
    assert {line.split('"')[1] for line in text.splitlines() if line[0] == "["} == {
        "machines", "sweeps", "variants", "cells", "records",
    }  # fmt: skip
    with pytest.raises(UnknownName, match="unknown section 'records'"):
        export(filled, tmp_path / "b.jsonl", leave_out=("records",))


def test_only_what_is_wanted(filled, tmp_path):
    text = export(filled, tmp_path / "a.jsonl", methods=["gptq"], statuses=["failed"]).decode()
    assert text.count('["cells"') == text.count('["variants"') == text.count('["sweeps"') == 1
    with pytest.raises(ConfigError, match="nothing to export"):
        export(filled, tmp_path / "b.jsonl", models=["another"])
    with pytest.raises(UnknownName, match="unknown sweep '9'"):
        export(filled, tmp_path / "b.jsonl", sweep=9)
    assert not (tmp_path / "b.jsonl").exists()


def test_a_gzipped_file_is_the_same_bytes_each_time(filled, tmp_path):
    first = export(filled, tmp_path / "a.jsonl.gz")
    assert export(filled, tmp_path / "b.jsonl.gz") == first
    assert gzip.decompress(first) == export(filled, tmp_path / "a.jsonl")


def test_nothing_names_a_person_a_machine_or_a_place(filled, tmp_path):
    text = export(filled, tmp_path / "a.jsonl").decode()
    for secret in ("jane", "/home", HOST, "secret words", "GPU-1234", '"pid"', "Traceback", "x.db"):
        assert secret not in text, secret
    assert "OSError: cannot read '<path>/x.bin' on <host>" in text
    assert "harness sweep --text <path>/kjv.txt --plugin ./p.py <host>" in text
    assert '"sm_clock_mhz": 1980' in text
    kept = export(filled, tmp_path / "b.jsonl", with_host=True).decode()
    assert '"pid"' not in kept, "a process number means nothing elsewhere"
    for told in ("/home/jane/models/x.bin", HOST, "secret words"):
        assert told in kept


def test_a_machine_called_like_a_method_changes_no_name(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        for host in ("gptq", "method", "acc", "hellaswag"):
            manifest = {**MANIFEST, "hostname": host, "sweep_uid": host}
            sweep = begin_sweep(store, make_variant(method="gptq"), manifest=manifest)
            write_task(store, sweep, make_result(f"on-{host}", reason=f"slow on {host}"))
        rows = queries.results(store)
        text = export(store, tmp_path / "a.jsonl").decode()
    assert "slow on <host>" in text
    with Store.open(tmp_path / "other.db") as other:
        import_(other, tmp_path / "a.jsonl")
        names = ["model", "method", "task", "metric", "value"]
        assert queries.results(other)[names].equals(rows[names])


def test_a_store_is_not_written_over(filled, tmp_path):
    for target in (tmp_path / "measured.db", tmp_path):
        with pytest.raises(ConfigError, match=r"is a (results store|directory)"):
            export(filled, target)
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        export(filled, tmp_path / "missing" / "a.jsonl")
    assert not list(tmp_path.glob(".*"))


# --- what is there stays as it is -----------------------------------------------------------------------


def test_a_pipe_is_neither_waited_for_nor_replaced(filled, tmp_path):
    pipe = tmp_path / "stdout"
    os.mkfifo(pipe)
    ours = os.open(pipe, os.O_RDWR)
    os.write(ours, bytes(100))  # or looking at what the file holds would wait
    with pytest.raises(ConfigError, match="stdout cannot be written: it is not an ordinary file"):
        export_results(filled, pipe, Wanted())
    os.close(ours)
    assert pipe.is_fifo()


def test_a_link_is_written_through(filled, tmp_path):
    link, file = tmp_path / "link.jsonl", tmp_path / "file.jsonl"
    file.write_text("old")
    link.symlink_to(file.name)
    export_results(filled, link, Wanted())
    assert link.is_symlink()
    assert read_results(file).sweeps


def test_importing_again_changes_nothing(file, store):
    [first] = import_(store, file)
    before = counts(store)
    [again] = import_(store, file)
    assert (first.sweeps, first.added, first.known) == (2, 5, 0)
    assert (again.sweeps, again.added, again.known) == (0, 0, 5)
    assert counts(store) == before


def test_what_a_store_measured_itself_is_left_out(filled, file):
    before = counts(filled)
    [done] = import_(filled, file)
    assert (done.own, done.added, done.sweeps) == (2, 0, 0)
    assert counts(filled) == before


def test_more_of_a_sweep_is_added_to_it(filled, store, tmp_path):
    whole = export(filled, tmp_path / "whole.jsonl")
    export(filled, tmp_path / "part.jsonl", statuses=["failed"])
    [part] = import_(store, tmp_path / "part.jsonl")
    [rest] = import_(store, tmp_path / "whole.jsonl")
    assert (part.sweeps, part.added) == (1, 1)
    assert (rest.sweeps, rest.added, rest.known) == (1, 4, 1)
    assert export(store, tmp_path / "again.jsonl") == whole


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_later_sweep_has_the_later_ids(names, store, tmp_path):
    """Which of several cells for one place is the newest goes by them."""
    with Store.open(tmp_path / "measured.db") as measured:
        for name in names:
            sweep = begin_sweep(measured, make_variant(name), manifest={**MANIFEST, "sweep_uid": name})
            write_task(measured, sweep, make_result(f"task-{name}", name))
        export(measured, tmp_path / "rows.jsonl")
    import_(store, tmp_path / "rows.jsonl")
    found = queries.results(store).groupby("sweep")["cell"].max().tolist()
    assert found == sorted(found)


def test_imported_rows_are_marked_and_never_taken_for_measured_ones(file, store):
    import_(store, file, origin="a colleague")
    assert store.finished_cells(["task", "base-task", "failed"]) == {}
    assert set(queries.results(store)["origin"]) == set(queries.sweeps(store)["origin"]) == {"a colleague"}
    assert list(durations(store)) == [], "another machine's times are no estimate for this one"
    sweep = begin_sweep(store)  # the same variant and the same cell, measured here
    write_task(store, sweep, make_result("task"))
    assert set(store.finished_cells(["task"])) == {"task"}
    frame = queries.results(store, methods=["gptq"], tasks=["hellaswag"], metrics=["latency"])
    assert sorted(frame["origin"], key=str) == [None, "a colleague"]
    assert set(queries.results(store, sweep="last")["sweep"]) == {sweep}


def test_a_later_import_neither_shadows_nor_changes_what_was_measured_here(file, store):
    sweep = begin_sweep(store)
    cell = write_task(store, sweep, make_result("task"))
    mine = ModuleEffect("mine", "Linear", False, "float32", 1, 4, 4)
    store.write_effects("variant-a", VariantReport("variant-a", (mine,)))
    import_(store, file)
    assert store.finished_cells(["task"])["task"].id == cell
    here = queries.results(store, sweep=sweep)
    assert here["origin"].isna().all()
    assert queries.effects(store, int(here["variant"].iloc[0]))["module"].tolist() == ["mine"]
    assert queries.results(store, sweep="last")["cell"].unique().tolist() == [cell]


def test_variants_of_two_origins_are_one_only_where_nothing_differs(filled, file, store, tmp_path):
    with Store.open(tmp_path / "other.db") as other:
        fill(other)
        changed = (tmp_path / "other.db", "third")
        sweep = begin_sweep(other, manifest={**MANIFEST, "sweep_uid": changed[1]})
        write_task(other, sweep, make_result("base-task", "base"))
        export(other, tmp_path / "other.jsonl", sweep=sweep)
        other.write_variant(sweep, make_variant("base", simulated=True))
        sweep = begin_sweep(other, manifest={**MANIFEST, "sweep_uid": "fourth"})
        write_task(other, sweep, make_result("base-task", "base"))
        export(other, tmp_path / "differs.jsonl", sweep=sweep)
    import_(store, file, tmp_path / "other.jsonl")
    assert counts(store)["variants"] == 2
    import_(store, tmp_path / "differs.jsonl")
    assert counts(store)["variants"] == 3
    frame = queries.results(store, methods=["baseline"], metrics=["acc"], tasks=["hellaswag"])
    assert sorted(frame["origin"]) == ["differs.jsonl", "other.jsonl", "rows.jsonl"]


# --- all or nothing -------------------------------------------------------------------------------------


def test_one_bad_file_keeps_all_out(file, store, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(file.read_text().replace('"hellaswag"', "7"))
    with pytest.raises(ConfigError, match=r"bad.jsonl, line \d+: cells.task"):
        import_(store, file, bad)
    assert not any(counts(store).values())


def test_a_store_that_breaks_in_the_middle_keeps_all_out(file, store, monkeypatch):
    from harness.store import exchange_import

    def break_down(*_):
        raise StoreError("the disk is full")

    monkeypatch.setattr(exchange_import, "_link", break_down)
    with pytest.raises(StoreError, match="the disk is full"):
        import_(store, file)
    assert not any(counts(store).values())
    with store.reading() as connection:
        assert connection.scalar(select(func.count()).select_from(imports)) == 0


def test_a_store_that_is_only_read_takes_nothing(file, target):
    Store.open(target).close()
    with Store.open_readonly(target) as reader, pytest.raises(StoreError, match="read-only"):
        import_(reader, file)
