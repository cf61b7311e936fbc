from __future__ import annotations

import math

import numpy as np
import pytest
from harness_dashboard import queries
from harness_dashboard.queries import Filters
from harness_dashboard.queries.compared import independent_interval

from harness.records import CellKind, CellResult, Item, KernelUse, Record, Status
from harness.store import queries as stored
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, around, timed
from tests.dashboard.filling import HOSTILE, MODEL, SHAPE, SMALL, variant_row

ACCURACY, DECODE = "acc · hellaswag", f"decode_latency · {SMALL}"


@pytest.fixture
def about(filled):
    return queries.described(filled, queries.matching(filled, Filters(), None))


@pytest.fixture
def ids(about):
    return about[about["model"] == MODEL].set_index("method")["variant"].to_dict()


def columns_of(store, *names, sweep=None):
    by_name = {column.name: column for column in queries.columns(store, sweep)}
    return [by_name[name] for name in names]


def deltas(store, *names, about=None, pairs=None):
    """The differences of all variants to their baselines, with what describes them."""
    if about is None:
        about = queries.described(store, queries.matching(store, Filters(), None))
    columns = columns_of(store, *names)
    values = queries.values(store, columns, None, about["variant"].tolist())
    pairs = queries.baselines(store, about, None) if pairs is None else pairs
    found = queries.differences(store, columns, values, pairs, about)
    return found.merge(about[["variant", "method", "model"]], on="variant")


def write(store, sweep, key, *records, family="quantization", task=None, scenario=None, items=(), **more):
    """A cell of a variant that is named as its key's first word."""
    variant = key.partition(" ")[0]
    store.write_variant(sweep, variant_row(variant, ((variant, {}),), family, key=variant))
    kind = CellKind.TASK if task else CellKind.SCENARIO
    result = CellResult(key, variant, more.pop("status", Status.OK), records=records, items=items, **more)
    return store.write_cell(sweep, result, kind=kind, task=task, scenario=scenario)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "results.db") as opened:
        yield opened


@pytest.fixture
def sweep(store):
    return store.open_sweep(command="", config={}, manifest={}, cells_planned=1)


# --- what variants are -------------------------------------------------------------------------


def test_variants_say_what_they_are(about):
    row = about[about["method"] == "smoothquant+gptq"].iloc[0]
    assert row["knobs"] == "alpha=0.5 + bits=4 group_size=-1"
    assert row["options"] == [{"alpha": 0.5}, {"bits": 4, "group_size": -1}]


def test_they_come_in_the_order_that_was_asked_for(filled, about):
    wanted = about["variant"].tolist()[::-1]
    assert queries.described(filled, wanted)["variant"].tolist() == wanted
    assert queries.described(filled, []).empty


def test_simulated_and_synthetic_rows_are_marked(about):
    marks = about.groupby("method")["marks"].agg(set)
    assert marks["wanda:sparsity=0.5"] == {"simulated"}
    assert set(about[about["model"] == SHAPE]["marks"]) == {"synthetic"}
    assert queries.marks_text(simulated=True, synthetic=True) == "simulated, synthetic"


def test_names_are_as_short_as_they_can_be(filled, about):
    assert "gptq:bits=4 · zoo:llama-6m" in set(about["name"])
    alone = queries.named(about[about["model"] == MODEL])
    assert {"baseline", "gptq:bits=4"} <= set(alone["name"])
    assert alone["name"].is_unique


def test_two_variants_that_differ_in_nothing_visible_have_two_names(store, sweep):
    for key in ("before", "after an upgrade"):
        store.write_variant(sweep, variant_row("gptq", (("gptq", {}),), "quantization", key=key))
    assert queries.described(store, [1, 2])["name"].tolist() == ["gptq · #1", "gptq · #2"]


def test_the_stamp_changes_with_every_addition(store):
    stamps = [queries.stamp(store)]
    sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
    stamps.append(queries.stamp(store))
    cell = write(store, sweep, "v t", task="t", status=Status.FAILED, reason="why")
    stamps.append(queries.stamp(store))
    store.write_derived(cell, [Record("flips", 0.5, "fraction")])
    stamps.append(queries.stamp(store))
    assert len(set(stamps)) == 4


# --- filters and pages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), 15),
        (Filters(models=(SHAPE,)), 3),
        (Filters(methods=("gptq:bits=4",)), 2),
        (Filters(methods=("gptq",)), 3),
        (Filters(methods=("smoothquant+gptq",)), 1),
        (Filters(methods=("no such method",)), 0),
        (Filters(families=("pruning", "attention")), 3),
        (Filters(devices=("another",)), 0),
        (Filters(statuses=("oom", "crashed")), 2),
        (Filters(models=(MODEL,), methods=("gptq:bits=4",)), 1),
        (Filters(search="GPTQ llama-6m"), 3),
        (Filters(search="h100 prun"), 2),
        (Filters(search="100%"), 0),
        (Filters(search="_"), 1),
    ],
)
def test_filters(filled, filters, expected):
    found = queries.matching(filled, filters, None)
    assert len(found) == len(set(found)) == expected
    assert queries.shown(filled, filters, None, count=99) == found


def test_a_sweep_has_its_own_variants(filled):
    assert len(queries.matching(filled, Filters(), 1)) == 15
    assert queries.matching(filled, Filters(), 2) == []
    assert (queries.is_empty(filled, 1), queries.is_empty(filled, 2)) == (False, True)
    assert queries.sweep_ids(filled) == [2, 1]


def test_the_filters_offer_what_there_is(filled):
    offered = queries.options(filled, None)
    assert offered.models == (SHAPE, MODEL)
    assert "gptq:bits=3" in offered.methods
    assert offered.tasks == ("hellaswag", "wikitext")
    assert offered.statuses == ("crashed", "not_applicable", "ok", "oom")
    assert queries.options(filled, 1) == offered
    assert queries.options(filled, 2).models == ()


def test_of_too_many_settings_only_the_methods_are_offered(store, sweep):
    for bits in range(201):
        row = variant_row(f"gptq:bits={bits}", (("gptq", {}),), "quantization", key=str(bits))
        store.write_variant(sweep, row)
        result = CellResult(f"{bits}", str(bits), Status.SKIPPED)
        store.write_cell(sweep, result, kind=CellKind.TRANSFORM, task=None, scenario=None)
    assert queries.options(store, None).methods == ("gptq",)
    assert len(queries.matching(store, Filters(methods=("gptq",)), None)) == 201


def test_a_list_is_sorted_by_a_figure_whole_and_then_cut(filled, ids):
    [decode] = columns_of(filled, DECODE)
    mine = Filters(models=(MODEL,))
    whole = queries.shown(filled, mine, None, by=decode, descending=False, count=99)
    values = queries.values(filled, [decode], None, whole).set_index("variant")["value"].reindex(whole)
    measured = values.dropna()
    assert measured.is_monotonic_increasing
    assert values.notna().tolist() == [True] * len(measured) + [False] * (len(whole) - len(measured))
    assert whole[0] == ids["smoothquant+gptq"]
    pages = [
        queries.shown(filled, mine, None, by=decode, descending=False, first=first, count=5)
        for first in (0, 5, 10)
    ]
    assert [len(each) for each in pages] == [5, 5, 2]
    assert [*pages[0], *pages[1], *pages[2]] == whole
    downwards = queries.shown(filled, mine, None, by=decode, count=99)
    assert downwards[: len(measured)] == whole[: len(measured)][::-1]
    by_name = queries.described(filled, queries.shown(filled, mine, None, by="method", descending=False))
    assert by_name["method"].is_monotonic_increasing


def test_how_cells_ended(filled, ids):
    ended = queries.how_cells_ended(filled, None)
    assert ended["cells"].sum() == 50
    mine = ended[ended["variant"] == ids["moe"]]
    assert mine[["status", "cells"]].values.tolist() == [["oom", 1]]


# --- columns and values ------------------------------------------------------------------------


def test_columns_come_with_unit_and_direction_and_the_leading_ones_first(filled):
    found = queries.columns(filled, None)
    assert found[0].name == f"weight_bytes · {SMALL}"
    assert found[-1].name == "acc_flips · hellaswag"
    by_name = {column.name: column for column in found}
    assert (by_name[ACCURACY].unit, by_name[ACCURACY].direction) == ("fraction", "higher")
    assert (by_name[DECODE].unit, by_name[DECODE].direction) == ("s", "lower")
    assert by_name[DECODE].models == {MODEL, SHAPE}
    assert by_name[ACCURACY].models == {MODEL}
    leading = queries.leading(found)
    assert ACCURACY in leading
    assert sum(name.startswith("decode_latency") for name in leading) == 1
    assert [column.name for column in queries.columns(filled, 1)] == [column.name for column in found]
    assert queries.columns(filled, 2) == []


def test_a_task_filter_leaves_the_timings(filled):
    left = queries.of_models(queries.columns(filled, None), (), ("wikitext",))
    assert {column.place for column in left if column.kind == "task"} == {"wikitext"}
    assert DECODE in {column.name for column in left}
    synthetic = queries.of_models(queries.columns(filled, None), (SHAPE,))
    assert {column.kind for column in synthetic} == {"scenario"}


@pytest.mark.parametrize(
    ("metric", "place", "aspect"),
    [
        ("acc", "hellaswag", "quality"),
        ("decode_latency", SMALL, "latency"),
        ("decode_throughput", SMALL, "throughput"),
        ("weight_bytes", SMALL, "memory"),
        ("kv_cache_bytes_per_token", SMALL, "memory"),
        ("transform_s", "transform", "cost to compress"),
    ],
)
def test_what_a_column_is_about(filled, metric, place, aspect):
    [found] = [c for c in queries.columns(filled, None) if (c.metric, c.place) == (metric, place)]
    assert found.aspect == aspect


def test_values_are_those_of_the_store(filled, ids):
    columns = queries.columns(filled, None)
    found = queries.values(filled, columns, None, list(ids.values()))
    row = found[(found["variant"] == ids["gptq:bits=4"]) & (found["column"] == DECODE)].iloc[0]
    assert (row["value"], row["lower"], row["upper"]) == pytest.approx(
        (0.0021 * 0.58, 0.0021 * 0.58 * 0.98, 0.0021 * 0.58 * 1.03)
    )
    assert (row["n"], row["mode"], row["sweep"]) == (20, "graph", 1)
    assert not found["variant"].isin([ids["moe"]]).any()
    once = queries.everything(filled, columns, None, list(ids.values()))
    key = ["variant", "column"]
    assert once.sort_values(key, ignore_index=True).equals(found.sort_values(key, ignore_index=True))
    assert queries.values(filled, columns, 2, list(ids.values())).empty


def test_of_two_settings_the_newer_cell_is_shown(store, sweep):
    for key, value in (("v before", 0.1), ("v after", 0.2)):
        write(store, sweep, key, Record("acc", value, "fraction"), task="t")
    columns = queries.columns(store, None)
    for read in (queries.values, queries.everything):
        assert read(store, columns, None, [1])["value"].tolist() == [0.2]
    assert queries.histories(store, columns[0], [1]) == {1: [0.1, 0.2]}


def test_what_was_measured_again_is_not_shown(store, sweep):
    """A newer cell of the same key counts, even where it has no record."""
    write(store, sweep, "v t", Record("acc", 0.1, "fraction"), task="t")
    write(store, sweep, "v t", task="t", status=Status.FAILED, reason="why")
    columns = queries.columns(store, None)
    assert queries.values(store, columns, None, [1]).empty
    assert queries.everything(store, columns, None, [1]).empty
    assert queries.how_cells_ended(store, None)["status"].tolist() == ["failed"]
    assert len(queries.how_cells_ended(store, sweep)) == 2, "the sweep measured both"


@pytest.mark.parametrize("read", [queries.values, queries.everything])
def test_scores_with_a_limit_or_other_windows_have_columns_of_their_own(store, sweep, read):
    def note(length, windows):
        return f"seq_len={length}, windows={windows}, dropped_tokens=0"

    limited = store.open_sweep(command="", config={"limit": 10}, manifest={}, cells_planned=1)
    for key, of, value, said in (
        ("a 1", sweep, 1.0, note(128, 9)),
        ("b 1", sweep, 2.0, note(512, 9)),
        ("c 1", sweep, 3.0, note(128, 90)),
        ("d 1", limited, 4.0, note(128, 9)),
    ):
        write(store, of, key, Record("token_perplexity", value, "ppl", note=said), task="t")
    columns = queries.columns(store, None)
    found = read(store, columns, None, [1, 2, 3, 4])
    assert dict(zip(found["column"], found["value"], strict=True)) == {
        "token_perplexity · t (windows of 128, 9 windows)": 1.0,
        "token_perplexity · t (windows of 512)": 2.0,
        "token_perplexity · t (windows of 128, 90 windows)": 3.0,
        "token_perplexity · t (limit 10)": 4.0,
    }


def test_points_need_all_figures(filled, ids):
    points = queries.points(filled, columns_of(filled, DECODE, ACCURACY), Filters(), None)
    assert len(points) == 8, "neither failed nor synthetic variants"
    row = points.set_index("variant").loc[ids["baseline"]]
    assert (row["x"], row["x_lower"], row["x_upper"]) == pytest.approx((0.0021, 0.002058, 0.002163))
    assert row["y_lower"] < row["y"] < row["y_upper"]
    three = queries.points(
        filled, columns_of(filled, DECODE, ACCURACY, "transform_s"), Filters(families=("pruning",)), None
    )
    assert three["z"].tolist() == pytest.approx([3.5 * 1.02, 3.5 * 0.98])


def test_option_tables_stand_side_by_side(filled, ids):
    table = queries.option_table(queries.described(filled, [ids["baseline"], ids["smoothquant+gptq"]]))
    _, second = table.columns
    assert table.loc["step 1: alpha"].tolist() == ["", "0.5"]
    assert table.loc["step 2: group_size", second] == "-1"
    assert table.loc["method"].tolist() == ["baseline", "smoothquant+gptq"]


def test_an_option_hides_nothing_of_its_variant(store):
    chain = [{"name": "new", "options": {"dtype": "int8", "bits": 4}}]
    add_cell(store, add_sweep(store), "new", Record("acc", 0.5, "fraction"), task="t", chain=chain)
    table = queries.option_table(queries.described(store, [1]))["new"]
    assert table[["dtype", "option dtype", "bits"]].tolist() == ["bfloat16", "int8", "4"]


def test_what_transforms_changed(filled, ids):
    found = queries.changes(filled, [ids["gptq:bits=4"], ids["moe"], ids[HOSTILE]])
    assert found["modules"].tolist() == [1, 0, 0]
    assert found["bytes_after"][0] == 600_000
    assert found["simulated"].tolist() == [False, None, None]


# --- differences ------------------------------------------------------------------------------


def test_every_variant_meets_the_baseline_of_its_own_setting(filled, about):
    known = about.set_index("variant")
    pairs = queries.baselines(filled, about, None)
    assert len(pairs) == 13
    for variant, baseline in pairs.items():
        assert known.loc[baseline, "family"] == "baseline"
        assert known.loc[baseline, "model"] == known.loc[variant, "model"]
        assert known.loc[variant, "family"] != "baseline"
    assert queries.baselines(filled, about, 2) == {}


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"device_name": "another GPU"}, {"seed": 1}, {"origin": "theirs.jsonl"}]
)
def test_another_setting_is_no_baseline(filled, about, change):
    [(name, value)] = change.items()
    changed = about.copy()
    changed.loc[changed["method"] == "gptq:bits=3", name] = value
    unpaired = set(queries.baselines(filled, about, None)) - set(queries.baselines(filled, changed, None))
    assert set(about[about["variant"].isin(unpaired)]["method"]) == {"gptq:bits=3"}


def test_scores_are_compared_item_by_item(filled, ids):
    table = deltas(filled, ACCURACY).set_index("method")
    row = table.loc["magnitude"]
    values = queries.values(filled, columns_of(filled, ACCURACY), None, [ids["baseline"], ids["magnitude"]])
    cells = values.set_index("variant")["cell"]
    both = stored.paired_items(filled, cells[ids["baseline"]], cells[ids["magnitude"]], "acc")
    difference = both["b"] - both["a"]
    # The normal interval of a paired difference, as an independent reference for the bootstrap.
    half = 1.96 * difference.std() / math.sqrt(len(difference))
    assert (row["basis"], row["test"], row["n"]) == ("items", "McNemar", 200)
    assert row["difference"] == pytest.approx(difference.mean())
    assert row["lower"] == pytest.approx(difference.mean() - half, abs=0.015)
    assert row["upper"] == pytest.approx(difference.mean() + half, abs=0.015)
    assert row["flips"] == pytest.approx((difference != 0).mean())
    assert (row["verdict"], row["p"] < 0.001, 0 < row["detectable"] < 0.2) == ("worse", True, True)
    assert table.loc["gptq:bits=4", "verdict"] == "no clear difference"


def test_p_values_are_adjusted_for_all_rows(filled, about, ids):
    whole = deltas(filled, ACCURACY).set_index("method")["p"]
    pair = {ids["wanda:sparsity=0.5"]: ids["baseline"]}
    alone = deltas(filled, ACCURACY, pairs=pair).set_index("method")["p"]
    assert alone["wanda:sparsity=0.5"] < whole["wanda:sparsity=0.5"]


def test_items_that_do_not_explain_the_value_are_not_used(store, sweep):
    """A score that is no mean over its items (a macro average) has no paired interval."""
    for family, value in (("baseline", 0.5), ("quantization", 0.9)):
        items = tuple(Item(index, "f1", float(index % 2)) for index in range(10))
        record = Record("f1", value, "fraction", value - 0.1, value + 0.1, 10)
        write(store, sweep, family, record, family=family, task="t", items=items)
    [row] = deltas(store, "f1 · t").to_dict("records")
    assert (row["basis"], row["test"]) == ("intervals", "")
    assert (row["lower"], row["upper"]) == pytest.approx(
        (0.4 - math.hypot(0.1, 0.1), 0.4 + math.hypot(0.1, 0.1))
    )
    assert row["verdict"] == "better"


def test_independent_intervals_cover_as_they_say():
    """MOVER against simulation: 95 % intervals of a difference hold the truth in 95 % of the cases."""
    rng = np.random.default_rng(0)
    spread_a, spread_b, held, trials = 1.0, 2.0, 0, 2000
    for _ in range(trials):
        a, b = rng.normal(10, spread_a), rng.normal(12, spread_b)
        sides = [(value - 1.96 * s, value, value + 1.96 * s) for value, s in ((a, spread_a), (b, spread_b))]
        lower, upper = independent_interval(*sides)
        held += lower <= 2 <= upper
    assert held / trials == pytest.approx(0.95, abs=0.02)


def test_differences_of_timings_and_of_counted_bytes(filled):
    weight, cache, throughput = (
        f"{metric} · {SMALL}" for metric in ("weight_bytes", "kv_cache_bytes_per_token", "decode_throughput")
    )
    table = deltas(filled, DECODE, weight, cache, throughput, "transform_s")
    mine = table[(table["method"] == "gptq:bits=4") & (table["model"] == MODEL)]
    rows = mine.set_index("metric")
    assert rows["basis"].tolist() == ["unpaired", "counted", "counted", "intervals", "reading"]
    assert rows["verdict"].tolist() == [
        "1.72x faster", "3.33x smaller", "equal", "1.72x faster", "1.72x faster",
    ]  # fmt: skip
    assert rows.loc["decode_latency", "ratio"] == pytest.approx(0.58, rel=0.03)
    assert rows.loc["weight_bytes", "lower"] == rows.loc["weight_bytes", "ratio"] == pytest.approx(0.3)
    # On the logarithmic scale: 0.97 and 1.02 around each of two throughputs.
    spread = math.hypot(math.log(0.97), math.log(1.02))
    assert rows.loc["decode_throughput", "lower"] == pytest.approx(math.exp(-spread) / 0.58)
    assert math.isnan(rows.loc["transform_s", "lower"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", ["baseline", "new"])
def test_what_is_no_number_is_not_compared(store, value, broken):
    sweep = add_sweep(store)
    for method in ("baseline", "new"):
        perplexity = value if method == broken else 8.0
        records = Record("token_perplexity", perplexity, "ppl"), Record("acc", 0.5, "fraction", 0.4, 0.6, 9)
        add_cell(store, sweep, method, *records, task="hellaswag")
    found = deltas(store, "token_perplexity · hellaswag", ACCURACY)
    assert found["metric"].tolist() == ["acc"]


def test_doubtful_comparisons_are_flagged(store):
    for family, mode in (("baseline", "graph"), ("quantization", "eager")):
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
        record = Record("decode_latency", 1.0, "s", 0.9, 1.1, 5, mode=mode)
        write(store, sweep, family, record, family=family, scenario=SMALL)
    [row] = deltas(store, DECODE).to_dict("records")
    assert row["caution"] == "not comparable, mode: graph and eager; measured in different sweeps"


def test_two_models_can_be_held_against_each_other(filled, about):
    baselines = about[about["family"] == "baseline"].set_index("model")["variant"]
    row = deltas(filled, DECODE, pairs={baselines[SHAPE]: baselines[MODEL]}).iloc[0]
    assert row["ratio"] == pytest.approx(1000, rel=0.05)
    assert f"model: {MODEL} and {SHAPE}" in row["caution"]


@pytest.mark.parametrize("other", [{"model": "n"}, {"seed": 1}, {"dtype": "float32"}, {"device_name": "b"}])
def test_rounds_against_another_baseline_are_no_ratio_to_this_one(store, other):
    sweep = add_sweep(store)
    for setting, seconds in (({}, 0.01), (other, 0.1)):
        add_cell(
            store, sweep, "baseline", timed("decode_latency", around(seconds)), scenario=SMALL, **setting
        )
        faster = timed("decode_speedup", around(2.0), "x", "graph, paired")
        new = timed("decode_latency", around(seconds / 2))
        add_cell(store, sweep, "new", new, faster, scenario=SMALL, **setting)
    about = queries.described(store, [1, 2, 4])
    mine, others = deltas(store, DECODE, about=about, pairs={2: 1, 4: 1}).to_dict("records")
    assert (mine["verdict"], mine["basis"]) == ("2x faster", "paired")
    assert (others["baseline"], others["value"]) == pytest.approx((0.01, 0.05))
    assert (others["verdict"], others["basis"]) == ("5x slower", "unpaired")


# --- details ----------------------------------------------------------------------------------


def test_items_that_changed(filled, ids):
    first, other = ids["baseline"], ids["magnitude"]
    places = queries.item_places(filled, first, other, None)
    assert list(places) == [ACCURACY]
    assert queries.item_places(filled, first, ids["moe"], None) == {}
    a, b, metric = places[ACCURACY]
    both = stored.paired_items(filled, a, b, metric)
    changed = both[both["a"] != both["b"]]
    found = queries.changed_items(filled, a, b, metric, 1000)
    assert (found.items, found.changed) == (200, len(changed))
    assert sorted(found.rows["index"]) == changed["index"].tolist()
    assert set(found.rows["change"]) == {1.0, -1.0}
    cut = queries.changed_items(filled, a, b, metric, 3)
    assert (cut.changed, len(cut.rows)) == (len(changed), 3)
    index = int(found.rows["index"][0])
    outcome, detail = queries.item_detail(filled, b, metric, index)
    assert outcome == found.rows["other"][0]
    assert detail["loglikelihoods"][0] == -1.0 - index


def test_an_item_that_only_one_could_answer_comes_first(store, sweep):
    for key, outcomes in (("a", (1.0, 2.0, 3.0)), ("b", (1.5, 2.0, math.nan))):
        items = tuple(Item(index, "nll", outcome) for index, outcome in enumerate(outcomes))
        write(store, sweep, key, Record("nll", 2.0, "nats"), task="t", items=items)
    found = queries.changed_items(store, 1, 2, "nll", 10)
    assert found.rows["index"].tolist() == [2, 0]
    assert (found.items, found.changed) == (3, 2)


def test_raw_readings_and_their_spread(filled, ids):
    mine = [ids["baseline"], ids["gptq:bits=4"]]
    values = queries.values(filled, columns_of(filled, DECODE, f"weight_bytes · {SMALL}"), None, mine)
    decode = values[values["column"] == DECODE]
    assert queries.has_readings(filled, values["record"]) == set(decode["record"])
    found = queries.readings(filled, decode)
    assert found.groupby("variant").size().to_dict() == dict.fromkeys(mine, 20)
    spread = queries.histograms(filled, dict(zip(decode["variant"], decode["record"], strict=True)))
    assert {variant: sum(bins) for variant, bins in spread.items()} == dict.fromkeys(mine, 20)
    assert all(len(bins) == 12 and bins[0] and bins[-1] for bins in spread.values())


def test_why_a_variant_is_as_fast_as_it_is(store, sweep):
    kernels = (KernelUse("decode", "gemm", "matmul", 6, 0.001, 1.0),)
    for key in ("a", "b"):
        write(
            store, sweep, f"{key} small", Record("decode_latency", 1.0, "s"), scenario=SMALL, kernels=kernels
        )
    write(store, sweep, "a large", Record("verdict", 1.0, "1", note="launch-bound"), scenario="b8-p1-g1")
    assert queries.shapes(store, [1, 2], None) == [SMALL]
    assert queries.shapes(store, [1], None) == [SMALL, "b8-p1-g1"]
    found = queries.explanations(store, [2, 1], SMALL, None)
    assert list(found) == [2, 1]
    assert found[1].kernels == kernels
    assert found[1].value("decode_latency") == 1.0
    assert queries.explanations(store, [1, 2], "b8-p1-g1", None)[1].verdict == "launch-bound"


def test_a_capital_beyond_ascii_is_found_as_it_is_written(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        add_cell(store, add_sweep(store), "gptq", model="./Übung")
        for word in ("./Übung", "Übung gptq", "bung"):
            assert queries.matching(store, Filters(search=word), None) == [1], word
        assert queries.matching(store, Filters(search="Äpfel"), None) == []
