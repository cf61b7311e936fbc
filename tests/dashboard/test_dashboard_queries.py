from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from harness_dashboard import queries
from harness_dashboard.queries import Filters

from harness.records import CellKind, CellResult, Item, Record, Status
from harness.store import queries as stored
from harness.store.store import Store
from tests.dashboard.filling import HOSTILE, MODEL, SHAPE, SMALL, variant_row

ACCURACY, DECODE = "acc · hellaswag", f"decode_latency · {SMALL}"


@pytest.fixture
def frame(filled):
    return queries.load(filled)


def by_method(table, model=MODEL):
    return table[table["model"] == model].set_index("method")


# --- loading ----------------------------------------------------------------------------------


def test_rows_say_where_and_what(frame):
    row = frame[(frame["method"] == "smoothquant+gptq") & (frame["metric"] == "acc")].iloc[0]
    assert (row["place"], row["column"]) == ("hellaswag", ACCURACY)
    assert row["knobs"] == "alpha=0.5 + bits=4 group_size=-1"
    assert frame[frame["kind"] == "transform"]["place"].unique().tolist() == ["transform"]
    assert frame[frame["metric"].isna()]["column"].isna().all()


def test_simulated_and_synthetic_rows_are_marked(frame):
    marks = frame.groupby("method")["marks"].agg(set)
    assert marks["wanda:sparsity=0.5"] == {"simulated"}
    assert set(frame[frame["model"] == SHAPE]["marks"]) == {"synthetic"}
    assert queries.marks_text(simulated=True, synthetic=True) == "simulated, synthetic"


def test_names_are_as_short_as_they_can_be(frame):
    assert "gptq:bits=4 · zoo:llama-6m" in set(frame["name"])
    alone = queries.named(frame[frame["model"] == MODEL])
    assert {"baseline", "gptq:bits=4"} <= set(alone["name"])
    assert alone.groupby("name")["variant"].nunique().max() == 1


def test_two_variants_that_differ_in_nothing_visible_have_two_names(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=2)
        for key in ("before", "after an upgrade"):
            row = variant_row("gptq", (("gptq", {}),), "quantization", key=key)
            store.write_variant(sweep, row)
            result = CellResult(key, key, Status.OK, records=(Record("acc", 0.5, "fraction"),))
            store.write_cell(sweep, result, kind=CellKind.TASK, task="t", scenario=None)
        assert queries.load(store)["name"].tolist() == ["gptq · #1", "gptq · #2"]


def test_the_stamp_changes_with_every_addition(tmp_path):
    stamps = []
    with Store.open(tmp_path / "results.db") as store:
        stamps.append(queries.stamp(store))
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
        stamps.append(queries.stamp(store))
        store.write_variant(sweep, variant_row("gptq", (("gptq", {}),), "quantization", key="v"))
        result = CellResult("c", "v", Status.FAILED, "why")
        cell = store.write_cell(sweep, result, kind=CellKind.TASK, task="t", scenario=None)
        stamps.append(queries.stamp(store))
        store.write_derived(cell, [Record("flips", 0.5, "fraction")])
        stamps.append(queries.stamp(store))
    assert len(set(stamps)) == 4


# --- filters and tables -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), 15),
        (Filters(models=(SHAPE,)), 3),
        (Filters(methods=("gptq:bits=4",)), 2),
        (Filters(families=("pruning", "attention")), 3),
        (Filters(devices=("another",)), 0),
        (Filters(statuses=("oom", "crashed")), 2),
        (Filters(models=(MODEL,), methods=("gptq:bits=4",)), 1),
    ],
)
def test_filters(frame, filters, expected):
    assert queries.filtered(frame, filters)["variant"].nunique() == expected


def test_a_task_filter_leaves_the_timings(frame):
    left = queries.filtered(frame, Filters(tasks=("wikitext",)))
    assert set(left["task"].dropna()) == {"wikitext"}
    assert DECODE in set(left["column"])


def test_a_status_filter_keeps_the_whole_variant(frame):
    left = queries.filtered(frame, Filters(statuses=("not_applicable",), models=(SHAPE,)))
    assert set(left["status"]) == {"ok", "not_applicable"}


def test_the_overview_has_one_row_a_variant(frame):
    table = queries.overview(frame, [DECODE, ACCURACY, "nothing · here"])
    assert table.index.is_unique
    assert len(table) == 15
    mine = by_method(table)
    assert mine.loc["gptq:bits=4", DECODE] == pytest.approx(0.0021 * 0.58)
    assert mine.loc["baseline", "cells"] == "5 ok"
    assert mine.loc["moe", "cells"] == "1 oom"
    assert math.isnan(mine.loc["moe", DECODE])
    assert table["nothing · here"].isna().all()
    assert by_method(table, SHAPE).loc["baseline", "cells"] == "1 not_applicable, 1 ok"


def test_of_two_settings_the_newer_cell_is_shown(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=2)
        store.write_variant(sweep, variant_row("gptq", (("gptq", {}),), "quantization", key="v"))
        for key, value in (("limit 10", 0.1), ("limit 100", 0.2)):
            result = CellResult(key, "v", Status.OK, records=(Record("acc", value, "fraction"),))
            store.write_cell(sweep, result, kind=CellKind.TASK, task="t", scenario=None)
        frame = queries.load(store)
    assert len(frame) == 2
    assert queries.overview(frame, ["acc · t"])["acc · t"].tolist() == [0.2]


def test_columns_come_with_unit_and_direction_and_the_leading_ones_first(frame):
    about = queries.columns_of(frame).set_index("column")
    assert about.index[0] == f"weight_bytes · {SMALL}"
    assert about.index[-1] == "acc_flips · hellaswag"
    assert about.loc[ACCURACY, ["unit", "direction"]].tolist() == ["fraction", "higher"]
    assert about.loc[DECODE, ["unit", "direction"]].tolist() == ["s", "lower"]
    assert set(queries.columns_of(frame, ["task"])["place"]) == {"hellaswag", "wikitext"}
    leading = queries.leading_columns(about.reset_index())
    assert ACCURACY in leading
    assert sum(column.startswith("decode_latency") for column in leading) == 1


def test_points_need_both_figures(frame):
    points = queries.points(frame, DECODE, ACCURACY)
    assert len(points) == 8, "neither failed nor synthetic variants"
    row = points.set_index("method").loc["baseline"]
    assert (row["x"], row["x_lower"], row["x_upper"]) == pytest.approx((0.0021, 0.002058, 0.002163))
    assert row["y_lower"] < row["y"] < row["y_upper"]


def test_option_tables_stand_side_by_side(frame):
    ids = by_method(frame.drop_duplicates("variant"))["variant"]
    table = queries.option_table(frame, [ids["baseline"], ids["smoothquant+gptq"]])
    first, second = table.columns
    assert table.loc["step 1: alpha"].tolist() == ["", "0.5"]
    assert table.loc["step 2: group_size", second] == "-1"
    assert table.loc["method", first] == "baseline"


def test_failures_that_should_have_worked_come_first(filled):
    table = queries.failures(filled)
    assert table["status"].tolist() == ["crashed", "oom", *["not_applicable"] * 4]
    assert table["reason"][0] == HOSTILE
    assert table["place"].tolist()[:3] == ["transform", "transform", "hellaswag"]
    assert table["cell"].tolist()[2:] == sorted(table["cell"][2:], reverse=True)


# --- differences ------------------------------------------------------------------------------


def test_every_variant_meets_the_baseline_of_its_own_setting(frame):
    models = frame.drop_duplicates("variant").set_index("variant")[["model", "method", "family"]]
    pairs = queries.pairs_of(frame)
    assert len(pairs) == 13
    for variant, baseline in pairs.items():
        assert models.loc[baseline, "family"] == "baseline"
        assert models.loc[baseline, "model"] == models.loc[variant, "model"]
        assert models.loc[variant, "family"] != "baseline"


def test_another_dtype_or_device_is_no_baseline(frame):
    changed = frame.copy()
    changed.loc[changed["method"] == "gptq:bits=3", "dtype"] = "float16"
    changed.loc[changed["method"] == "magnitude", "device_name"] = "another GPU"
    unpaired = set(queries.pairs_of(frame)) - set(queries.pairs_of(changed))
    assert set(frame[frame["variant"].isin(unpaired)]["method"]) == {"gptq:bits=3", "magnitude"}


def test_scores_are_compared_item_by_item(filled, frame):
    table = by_method(queries.deltas(filled, frame, [ACCURACY]))
    row = table.loc["magnitude"]
    cells = frame[(frame["metric"] == "acc") & (frame["model"] == MODEL)].set_index("method")["cell"]
    both = stored.paired_items(filled, cells["baseline"], cells["magnitude"], "acc")
    difference = both["b"] - both["a"]
    # The normal interval of a paired difference, as an independent reference for the bootstrap.
    half = 1.96 * difference.std() / math.sqrt(len(difference))
    assert row["compared"] == "item by item"
    assert row["delta"] == pytest.approx(difference.mean())
    assert row["lower"] == pytest.approx(difference.mean() - half, abs=0.015)
    assert row["upper"] == pytest.approx(difference.mean() + half, abs=0.015)
    assert row["verdict"] == "worse"
    assert table.loc["gptq:bits=4", "verdict"] == "no clear difference"


def test_items_that_do_not_explain_the_value_are_not_used(tmp_path):
    """A score that is no mean over its items (a macro average) has no paired interval."""
    with Store.open(tmp_path / "results.db") as store:
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=2)
        for family, value in (("baseline", 0.5), ("quantization", 0.9)):
            store.write_variant(sweep, variant_row(family, ((family, {}),), family, key=family))
            items = tuple(Item(index, "f1", float(index % 2)) for index in range(10))
            record = Record("f1", value, "fraction", value - 0.1, value + 0.1, 10)
            result = CellResult(family, family, Status.OK, records=(record,), items=items)
            store.write_cell(sweep, result, kind=CellKind.TASK, task="t", scenario=None)
        [row] = queries.deltas(store, queries.load(store), ["f1 · t"]).to_dict("records")
    assert row["compared"] == "by intervals"
    assert (row["lower"], row["upper"]) == pytest.approx(
        (0.4 - math.hypot(0.1, 0.1), 0.4 + math.hypot(0.1, 0.1))
    )


def test_independent_intervals_cover_as_they_say():
    """MOVER against simulation: 95 % intervals of a difference hold the truth in 95 % of the cases."""
    rng = np.random.default_rng(0)
    spread_a, spread_b, held, trials = 1.0, 2.0, 0, 2000
    for _ in range(trials):
        a, b = rng.normal(10, spread_a), rng.normal(12, spread_b)
        rows = [
            pd.Series({"value": value, "lower": value - 1.96 * s, "upper": value + 1.96 * s})
            for value, s in ((a, spread_a), (b, spread_b))
        ]
        lower, upper = queries._independent_interval(*rows)
        held += lower <= 2 <= upper
    assert held / trials == pytest.approx(0.95, abs=0.02)


def test_differences_of_timings_and_of_counted_bytes(filled, frame):
    columns = [DECODE, f"weight_bytes · {SMALL}", f"kv_cache_bytes_per_token · {SMALL}", "transform_s"]
    table = queries.deltas(filled, frame, columns)
    rows = table[(table["method"] == "gptq:bits=4") & (table["model"] == MODEL)].set_index("metric")
    assert rows.index.tolist() == [
        "decode_latency",
        "weight_bytes",
        "kv_cache_bytes_per_token",
        "transform_s",
    ]
    assert rows["verdict"].tolist() == ["better", "better", "equal", ""]
    assert rows["compared"].tolist() == ["by intervals", "counted", "counted", "no interval"]
    assert rows.loc["decode_latency", "ratio"] == pytest.approx(0.58)
    assert rows.loc["weight_bytes", "lower"] == rows.loc["weight_bytes", "delta"]


def test_doubtful_comparisons_are_flagged(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        for family, mode in (("baseline", "graph"), ("quantization", "eager")):
            sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
            store.write_variant(sweep, variant_row(family, ((family, {}),), family, key=family))
            record = Record("decode_latency", 1.0, "s", 0.9, 1.1, 5, mode=mode)
            result = CellResult(family, family, Status.OK, records=(record,))
            store.write_cell(sweep, result, kind=CellKind.SCENARIO, task=None, scenario=SMALL)
        [row] = queries.deltas(store, queries.load(store), [DECODE]).to_dict("records")
    assert row["flag"] == "measured in different sweeps; timed differently (graph and eager)"


@pytest.mark.parametrize(
    ("lower", "upper", "direction", "verdict"),
    [
        (-2, -1, "lower", "better"),
        (-2, -1, "higher", "worse"),
        (1, 2, "lower", "worse"),
        (1, 2, "higher", "better"),
        (-1, 1, "lower", "no clear difference"),
        (0, 0, "lower", "equal"),
        (1, 2, None, ""),
        (math.nan, math.nan, "lower", ""),
    ],
)
def test_verdicts(lower, upper, direction, verdict):
    assert queries._verdict(lower, upper, direction) == verdict
