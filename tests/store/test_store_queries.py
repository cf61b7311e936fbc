from __future__ import annotations

import pandas as pd
import pytest

from harness.errors import UnknownName
from harness.records import CellKind, Item, Status
from harness.store import queries
from tests.store.rows import begin_sweep, make_result, make_variant, write_task


@pytest.fixture
def filled(store):
    """Three variants: a baseline, a method in two settings; a chain that failed."""
    baseline = make_variant("base", method="baseline", chain=[{"name": "baseline", "options": {}}],
                            family="baseline")  # fmt: skip
    plain = make_variant("plain", method="gptq", chain=[{"name": "gptq", "options": {"bits": 4}}])
    chained = make_variant(
        "chained",
        method="gptq:bits=3+rtn",
        chain=[{"name": "gptq", "options": {"bits": 3}}, {"name": "rtn", "options": {"bits": 8}}],
        model="zoo:opt-4m",
    )
    sweep = begin_sweep(store, baseline, make_variant(), plain, chained)
    for variant in ("base", "variant-a", "plain"):
        write_task(store, sweep, make_result(f"{variant}-task", variant))
        store.write_cell(
            sweep,
            make_result(f"{variant}-speed", variant, items=()),
            kind=CellKind.SCENARIO, task=None, scenario="b1-p8-g4",
        )  # fmt: skip
    write_task(
        store,
        sweep,
        make_result("chained-task", "chained", Status.FAILED, records=(), items=(), reason="broke",
                    traceback="Traceback ...", log_tail="last words"),
    )  # fmt: skip
    return store


def test_a_cell_without_records_is_one_row(filled):
    [row] = queries.results(filled, statuses=[Status.FAILED]).to_dict("records")
    assert (row["status"], row["reason"], row["metric"]) == ("failed", "broke", None)
    assert pd.isna(row["value"])
    assert pd.isna(row["n"])
    assert row["options"] == [{"bits": 3}, {"bits": 8}]


@pytest.mark.parametrize(
    ("wanted", "methods"),
    [
        (["gptq"], {"gptq", "gptq:bits=3"}),
        (["gptq:bits=3"], {"gptq:bits=3"}),
        (["gptq:bits=3+rtn", "baseline"], {"gptq:bits=3+rtn", "baseline"}),
        (["gpt%"], set()),
        ([], set()),
        (None, {"gptq", "gptq:bits=3", "gptq:bits=3+rtn", "baseline"}),
    ],
)
def test_a_name_without_options_means_every_setting(filled, wanted, methods):
    assert set(queries.results(filled, methods=wanted)["method"]) == methods


def test_filters_are_joined_by_and(filled):
    frame = queries.results(
        filled, models=["zoo:llama-6m"], methods=["baseline"], scenarios=["b1-p8-g4"],
        metrics=["latency"], statuses=["ok"],
    )  # fmt: skip
    assert len(frame) == 1
    assert queries.results(filled, tasks=["hellaswag"], scenarios=["b1-p8-g4"]).empty


def test_results_are_in_order(filled):
    frame = queries.results(filled)
    key = frame[["sweep", "model", "method", "cell"]]
    assert key.values.tolist() == sorted(key.values.tolist())
    assert frame["metric"].tolist()[:2] == ["acc", "latency"]


def test_an_unknown_sweep_is_named(filled):
    with pytest.raises(UnknownName, match="unknown sweep '7'; known: 1"):
        queries.results(filled, sweep=7)


def test_frames_of_an_empty_store_have_their_columns(store):
    assert list(queries.results(store, sweep="last").columns) == list(queries.RESULT_COLUMNS)
    for frame in (
        queries.sweeps(store), queries.variants(store), queries.effects(store, 1),
        queries.failures(store), queries.samples(store, []), queries.items(store, [5]),
        queries.paired_items(store, 1, 2, "acc"),
    ):  # fmt: skip
        assert frame.empty
        assert len(frame.columns) >= 3


def test_failures_say_why(filled):
    [row] = queries.failures(filled).to_dict("records")
    assert row["method"] == "gptq:bits=3+rtn"
    assert (row["reason"], row["traceback"], row["log_tail"]) == (
        "broke",
        "Traceback ...",
        "last words",
    )


def test_failures_of_a_sweep_stay_after_a_retry(filled):
    retried = begin_sweep(filled)
    write_task(filled, retried, make_result("chained-task", "chained"))
    assert queries.failures(filled).empty
    assert queries.failures(filled, sweep=1)["reason"].tolist() == ["broke"]
    assert queries.failures(filled, sweep="last").empty


def test_sweeps_count_their_cells(filled):
    [row] = queries.sweeps(filled).to_dict("records")
    assert (row["cells"], row["cells_ok"], row["cells_failed"]) == (7, 6, 1)
    assert row["status"] == "running"


def test_items_are_paired_by_their_index(store):
    sweep = begin_sweep(store)
    a = write_task(store, sweep, make_result("a"))
    changed = (Item(2, "acc", 1.0), Item(3, "acc", 0.0), Item(9, "acc", 1.0), Item(0, "nll", 7.0))
    b = write_task(store, sweep, make_result("b", items=changed))
    pairs = queries.paired_items(store, a, b, "acc")
    assert pairs.to_dict("list") == {"index": [2, 3], "a": [0.0, 1.0], "b": [1.0, 0.0]}
    both = queries.items(store, [b, a])
    assert both["cell"].tolist() == [a] * 4 + [b] * 4
    assert queries.items(store, range(1, 25_000)).equals(both), "more cells than one statement takes"


def test_an_engine_will_do(filled):
    assert queries.results(filled.engine).equals(queries.results(filled))
