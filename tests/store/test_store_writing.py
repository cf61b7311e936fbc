from __future__ import annotations

import math

import numpy as np
import pytest
from sqlalchemy import func, select, text

from harness.errors import StoreError
from harness.records import CellKind, Item, KernelUse, ModuleEffect, Record, Status, VariantReport
from harness.store import queries
from harness.store.encoding import dump_json, load_json
from harness.store.store import FinishedCell, Store
from harness.store.tables import cells, items, machines, records, samples, sweeps, variants
from tests.store.rows import begin_sweep, make_result, make_variant, write_task


def count(store, table):
    with store.reading() as connection:
        return connection.scalar(select(func.count()).select_from(table))


def test_a_cell_comes_back_as_it_was_written(store):
    sweep = begin_sweep(store)
    cell = write_task(store, sweep, make_result())
    frame = queries.results(store)
    assert list(frame.columns) == list(queries.RESULT_COLUMNS)
    assert frame["metric"].tolist() == ["acc", "latency"]
    row = frame.iloc[0]
    assert (row.value, row.lower, row.upper, row.n, row.unit) == (0.75, 0.5, 0.9, 4, "fraction")
    assert row["options"] == {"bits": 3, "group_size": 128}
    assert (row.model, row.method, row.task, row.scenario) == (
        "zoo:llama-6m", "gptq:bits=3", "hellaswag", None,
    )  # fmt: skip
    assert (row.status, row.reason, row.cell, row.sweep, row.simulated) == (
        "ok",
        None,
        cell,
        sweep,
        None,
    )
    assert frame.iloc[1]["mode"] == "eager"
    assert math.isnan(frame.iloc[1].lower)
    with store.reading() as connection:
        record = connection.scalar(select(records.c.id).where(records.c.metric == "latency"))
    assert queries.samples(store, [record])["value"].tolist() == [0.001, 0.002, 0.003]
    assert store.items(cell) == list(make_result().items)


def test_a_result_survives_closing_the_store(path):
    with Store.open(path) as store:
        write_task(store, begin_sweep(store), make_result())
    assert sorted(file.name for file in path.parent.iterdir()) == ["results.db"]
    with Store.open(path) as store:
        assert count(store, cells) == 1


def test_a_variant_is_stored_once_per_key(store):
    sweep = begin_sweep(store)
    first = store.write_variant(sweep, make_variant())
    assert store.write_variant(sweep, make_variant(simulated=True)) == first
    assert store.write_variant(sweep, make_variant("variant-b")) != first
    assert count(store, variants) == 2
    assert queries.variants(store)["simulated"].tolist() == [True, None]


def test_a_machine_is_stored_once(store):
    begin_sweep(store)
    begin_sweep(store, manifest={"device": "cpu", "cpu": "a processor", "commit": "another"})
    begin_sweep(store, manifest={"device": "cuda", "device_name": "a GPU", "cpu": "a processor"})
    assert count(store, machines) == 2
    assert queries.sweeps(store)["machine"].tolist() == [1, 1, 2]


def test_the_newest_cell_of_a_key_is_the_current_one_whatever_its_status(store):
    sweep = begin_sweep(store)
    write_task(store, sweep, make_result(status=Status.OOM, reason="no memory", records=()))
    other = write_task(store, sweep, make_result("cell-b"))
    retried = begin_sweep(store)
    newest = write_task(store, retried, make_result())
    assert store.finished_cells(["cell-a", "cell-b", "cell-c"]) == {
        "cell-a": FinishedCell(newest, "cell-a", Status.OK, None),
        "cell-b": FinishedCell(other, "cell-b", Status.OK, None),
    }
    assert set(queries.results(store)["cell"]) == {other, newest}
    assert queries.failures(store).empty
    # The earlier one is still in its sweep.
    assert queries.results(store, sweep=sweep)["status"].tolist() == ["oom", "ok", "ok"]
    assert set(queries.results(store, sweep="last")["cell"]) == {newest}


def test_more_keys_than_a_statement_takes(store):
    sweep = begin_sweep(store)
    write_task(store, sweep, make_result("cell-39999"))
    assert set(store.finished_cells(f"cell-{index}" for index in range(40_000))) == {"cell-39999"}


def test_linked_cells_belong_to_both_sweeps(store):
    first = begin_sweep(store)
    cell = write_task(store, first, make_result())
    second = begin_sweep(store)
    store.link_cells(second, [cell, cell])
    store.link_cells(second, [cell])
    frame = queries.results(store, sweep=second)
    assert set(frame["cell"]) == {cell}
    assert set(frame["sweep"]) == {first}, "the sweep that measured it"
    assert queries.sweeps(store)["cells"].tolist() == [1, 1]


def test_effects_replace_earlier_ones_and_say_whether_simulated(store):
    begin_sweep(store)
    old = ModuleEffect("a", "Linear", False, "float32", 8, 32, 32)
    new = ModuleEffect("b", "QuantLinear", True, "int8", 8, 32, 8, 8.5, 0.25, "2:4", True, "triton")
    store.write_effects("variant-a", VariantReport("variant-a", (old, old)))
    store.write_effects("variant-a", VariantReport("variant-a", (new,), simulated=True))
    [row] = queries.effects(store, 1).to_dict("records")
    assert row == {
        "module": "b", "kind": "QuantLinear", "changed": True, "dtype": "int8", "parameters": 8,
        "bytes_before": 32, "bytes_after": 8, "stored_bits_per_weight": 8.5, "sparsity": 0.25,
        "nm_pattern": "2:4", "simulated": True, "kernel": "triton",
    }  # fmt: skip
    [row] = queries.variants(store).to_dict("records")
    assert (row["simulated"], row["modules_changed"], row["bytes_after"]) == (True, 1, 8)


def test_derived_records_replace_those_of_the_same_metric(store):
    sweep = begin_sweep(store)
    cell = write_task(store, sweep, make_result())
    other = write_task(store, sweep, make_result("cell-b"))
    store.write_derived(cell, [Record("flips", 0.5, "fraction"), Record("latency", 9.0, "s")])
    store.write_derived(cell, [Record("flips", 0.25, "fraction", n=8)])
    frame = queries.results(store)
    mine = frame[frame.cell == cell].set_index("metric")["value"]
    assert mine.to_dict() == {"acc": 0.75, "latency": 9.0, "flips": 0.25}
    assert set(frame[frame.cell == other]["metric"]) == {"acc", "latency"}
    assert count(store, samples) == 3, "the replaced record's readings went with it"


def test_sweeps_end_once(store):
    sweep = begin_sweep(store)
    store.close_sweep(sweep, "interrupted", {"temperature_c": 60})
    [row] = queries.sweeps(store).to_dict("records")
    assert (row["status"], row["manifest_end"]) == ("interrupted", {"temperature_c": 60})
    assert row["finished_at"] >= row["started_at"]
    with pytest.raises(StoreError, match="finished or interrupted, not 'done'"):
        store.close_sweep(sweep, "done")
    with pytest.raises(StoreError, match="no sweep 99"):
        store.close_sweep(99, "finished")


def test_numbers_that_databases_disagree_about(store):
    sweep = begin_sweep(store)
    result = make_result(
        records=(
            Record("nan", math.nan, "x", lower=math.nan, upper=math.inf, samples=(math.nan, -math.inf)),
            Record("inf", math.inf, "x"),
            Record("numpy", np.float32(0.5), "x", n=np.int64(3), samples=(np.float64(0.1),)),
        ),
        items=(
            Item(0, "nll", math.nan, {"ll": [-math.inf, 1.0], "nan": math.nan}),
            Item(1, "nll", math.inf, {"numpy": np.float64(2.5), "array": np.arange(2)}),
        ),
    )
    cell = write_task(store, sweep, result)
    frame = queries.results(store).set_index("metric")
    assert math.isnan(frame.value["nan"])
    assert math.isnan(frame.lower["nan"])
    assert frame.upper["nan"] == frame.value["inf"] == math.inf
    assert (frame.value["numpy"], frame.n["numpy"]) == (0.5, 3)
    readings = queries.samples(store, range(1, 4))["value"].tolist()
    assert math.isnan(readings[0])
    assert readings[1:] == [-math.inf, 0.1]
    first, second = store.items(cell)
    assert math.isnan(first.outcome)
    assert math.isnan(first.detail["nan"])
    assert first.detail["ll"] == [-math.inf, 1.0]
    assert second == Item(1, "nll", math.inf, {"numpy": 2.5, "array": [0, 1]})
    with store.reading() as connection:  # a NaN does not spoil an average in SQL
        assert connection.scalar(select(func.avg(samples.c.value)).where(samples.c.record_id == 3)) == 0.1


def test_ids_from_a_frame_find_their_rows(store):
    cell = write_task(store, begin_sweep(store), make_result())
    from_frame = queries.results(store)["cell"].iloc[0]
    assert isinstance(from_frame, np.int64)
    assert len(store.items(from_frame)) == len(store.items(cell)) == 4
    assert len(queries.paired_items(store, from_frame, from_frame, "acc")) == 4


def test_stored_json_is_standard_json(store):
    sweep = begin_sweep(store, manifest={"cpu": "x", "power_w": math.nan})
    with store.reading() as connection:  # PostgreSQL would not have taken anything else
        if connection.dialect.name == "sqlite":
            assert connection.scalar(text("SELECT json_valid(manifest) FROM sweeps")) == 1
        assert math.isnan(connection.scalar(select(sweeps.c.manifest).where(sweeps.c.id == sweep))["power_w"])


def test_json_refuses_what_it_cannot_bring_back():
    assert load_json(dump_json({"$float": "text"})) == {"$float": "text"}
    with pytest.raises(TypeError, match="object cannot be stored"):
        dump_json({"x": object()})


def test_text_of_any_origin_can_be_stored(store):
    sweep = begin_sweep(store)
    broken = b"bad \xff byte".decode("utf-8", "surrogateescape")
    write_task(store, sweep, make_result(status=Status.CRASHED, reason="a\0b", log_tail=broken))
    [row] = queries.failures(store).to_dict("records")
    assert (row["reason"], row["log_tail"]) == ("a\ufffdb", "bad ? byte")


def test_a_cell_is_written_whole_or_not_at_all(store):
    sweep = begin_sweep(store)
    unstorable = Item(1, "acc", 1.0, {"x": object()})
    with pytest.raises(StoreError, match="cannot be stored as JSON"):
        write_task(store, sweep, make_result(items=(Item(0, "acc", 1.0), unstorable)))
    doubled = (Item(0, "acc", 1.0), Item(0, "acc", 0.0))
    with pytest.raises(StoreError, match="item 0 has two outcomes of 'acc'"):
        write_task(store, sweep, make_result(items=doubled))
    with pytest.raises(StoreError, match="no variant 'nobody'"):
        write_task(store, sweep, make_result(variant_key="nobody"))
    with pytest.raises(StoreError, match=r"(?i)foreign key"):
        write_task(store, 99, make_result())
    assert [count(store, table) for table in (cells, records, samples, items)] == [0, 0, 0, 0]


def test_a_reader_sees_one_state_until_it_ends(store, target):
    count = select(func.count()).select_from(cells)
    sweep = begin_sweep(store)
    with Store.open_readonly(target) as other:
        for number, reader in enumerate((other, store)):
            with reader.reading() as connection:
                before = connection.scalar(count)
                write_task(store, sweep, make_result(f"cell-{number}"))
                assert connection.scalar(count) == before
            with reader.reading() as connection:
                assert connection.scalar(count) == before + 1


def test_a_transform_cell_has_no_task(store):
    sweep = begin_sweep(store)
    store.write_cell(sweep, make_result(), kind=CellKind.TRANSFORM, task=None, scenario=None)
    frame = queries.results(store, scenarios=["transform"], metrics=["acc"])
    assert frame[["kind", "task", "scenario"]].values.tolist() == [["transform", None, "transform"]]


def test_kernels_come_back_prefill_first_and_in_their_order(store):
    sweep = begin_sweep(store)
    kernels = (
        KernelUse("prefill", "nvjet_tst", "gemm", 64, 0.75, 0.75),
        KernelUse("prefill", "flash_fwd", "attention", 32, 0.25, 0.25),
        KernelUse("decode", "_gemv_kernel", "gemm", 3, 0.5, 1.0),
    )
    cell = write_task(store, sweep, make_result(kernels=kernels))
    assert store.kernels(cell) == kernels
    frame = queries.kernels(store, [cell])
    assert frame["position"].tolist() == [0, 1, 0]
    assert frame["phase"].tolist() == ["prefill", "prefill", "decode"]
    assert store.records(cell)["acc"].value == 0.75
    effect = ModuleEffect("a", "QuantLinear", True, "int8", 8, 32, 8, 8.5, None, None, True, "triton")
    store.write_effects("variant-a", VariantReport("variant-a", (effect,), simulated=True))
    assert store.effects("variant-a") == ((effect,), True)
