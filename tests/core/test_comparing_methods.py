"""Which stored cells are compared, what is refused, and the command around it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harness.cli.app import run
from harness.comparing import break_even_batches, compare_methods
from harness.comparing.crossings import crossings_in_words
from harness.errors import ConfigError, UnknownName
from harness.evaluate.paired import benjamini_hochberg, mcnemar
from harness.records import Record, Status
from harness.scaling import Point, break_even
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, around, items, timed, variant_key

SHAPE = "b1-p8-g2"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with Store.open(path) as store:
        yield store


@pytest.fixture
def compare(path, capsys):
    def run_it(*arguments):
        capsys.readouterr()
        code = run(["compare", *arguments, "--db", str(path)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_it


def latency(store, sweep, method, seconds, mode="graph", **changes):
    record = timed("decode_latency", around(seconds), mode=mode)
    return add_cell(store, sweep, method, record, scenario=SHAPE, **changes)


def scored(store, sweep, method, outcomes, **changes):
    value = sum(outcomes) / len(outcomes)
    record = Record("acc", value, "fraction", n=len(outcomes))
    return add_cell(store, sweep, method, record, task="grammar", items=items(outcomes), **changes)


# --- the guard ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gpu": {"driver": "590"}}, "driver: 580.1 and 590"),
        ({"versions": {"torch": "2.12"}}, "torch version: 2.11 and 2.12"),
        ({"measuring_version": 3}, "measuring version: 2 and 3"),
        ({"gpu": {"power_cap_w": 400.0}}, "power cap (W): 700 and 400"),
    ],
)
def test_times_of_other_conditions_are_refused_and_shown_only_when_asked(store, compare, changes, line):
    latency(store, add_sweep(store), "baseline", 0.02)
    latency(store, add_sweep(store, **changes), "new", 0.01)
    with pytest.raises(ConfigError, match="baseline and new differ in"):
        compare_methods(store, "baseline", "new")
    code, out, err = compare("baseline", "new", "--format", "json")
    assert (code, json.loads(out)) == (2, [])
    assert err.splitlines()[0] == f"not compared: baseline and new differ in {line} ({SHAPE})"
    assert "--allow-different" in err
    code, out, err = compare("baseline", "new", "--allow-different")
    assert code == 0
    assert f"DIFFERENT {line}" in " ".join(out.split())
    assert f"DIFFERENT: baseline and new differ in {line}" in err


def test_rows_that_may_be_compared_are_shown_beside_those_that_may_not(store, compare):
    first, second = add_sweep(store), add_sweep(store, gpu={"driver": "590"})
    latency(store, first, "baseline", 0.02)
    latency(store, second, "new", 0.01)
    scored(store, first, "baseline", [1, 1, 0, 0])
    scored(store, second, "new", [1, 1, 1, 0])
    code, out, err = compare("baseline", "new", "--format", "json")
    assert code == 2
    assert [row["metric"] for row in json.loads(out)] == ["acc"]
    assert "1 of 2 rows are left out" in err


def test_eager_and_graph_are_not_compared(store):
    sweep = add_sweep(store)
    latency(store, sweep, "baseline", 0.02, mode="graph")
    latency(store, sweep, "new", 0.01, mode="eager, simulated")
    with pytest.raises(ConfigError, match="mode: graph and eager"):
        compare_methods(store, "baseline", "new")


@pytest.mark.parametrize("is_paired", [True, False])
def test_a_state_of_the_moment_leaves_paired_rounds_alone(store, is_paired):
    hot = {"gpu": {"sm_clock_mhz": 1200, "throttle_reasons": ["HwThermalSlowdown"]}}
    first, second = add_sweep(store), add_sweep(store, end=hot)
    latency(store, first, "baseline", 0.02)
    records = [timed("decode_latency", around(0.03))]
    if is_paired:
        records.append(timed("decode_speedup", around(2.0), "x", "graph, paired"))
    add_cell(store, second, "new", *records, scenario=SHAPE)
    (row,) = compare_methods(store, "baseline", "new", allow_different=True)
    assert row.is_comparable is is_paired
    if is_paired:
        assert row.verdict == "2x faster"
        assert "throttling: none and HwThermalSlowdown, in the rounds alike" in row.flags


def test_a_difference_that_is_clear_is_not_called_1x(store):
    sweep = add_sweep(store)
    for method, seconds in {"baseline": 1.0, "new": 1.0004}.items():
        record = timed("decode_latency", around(seconds, spread=1e-5))
        add_cell(store, sweep, method, record, scenario=SHAPE)
    (row,) = compare_methods(store, "baseline", "new")
    assert row.lower > 1
    assert row.verdict == "1.0004x slower"


def test_a_ratio_of_bytes_is_no_time(store):
    first, second = add_sweep(store), add_sweep(store, gpu={"driver": "590"}, workload={"jobs": 2})
    add_cell(store, first, "a", Record("compression_ratio", 1.0, "x"), Record("transform_s", 1.0, "s"))
    add_cell(store, second, "b", Record("compression_ratio", 2.0, "x"), Record("transform_s", 1.0, "s"))
    ratio, time = compare_methods(store, "a", "b", allow_different=True)
    assert (ratio.is_comparable, time.is_comparable) == (True, False)
    assert (ratio.metric, ratio.ratio, ratio.verdict) == ("compression_ratio", 2.0, "2x smaller")


def test_rounds_against_the_baseline_of_another_device_are_no_ratio_to_this_one(store):
    sweep = add_sweep(store)
    for shape, seconds in ((SHAPE, 0.01), ("b2-p8-g2", 0.02)):
        add_cell(store, sweep, "baseline", timed("decode_latency", around(seconds)), scenario=shape)
        records = timed("decode_latency", around(0.05)), timed("decode_speedup", around(2.0), "x")
        add_cell(store, sweep, "new", *records, scenario=shape, device_name="another")
    rows = compare_methods(store, "baseline", "new", allow_different=True)
    assert [row.verdict for row in rows if row.metric == "decode_latency"] == ["5x slower", "2.5x slower"]
    (crossing,) = break_even_batches(store, "baseline", ["new"])
    assert crossing.ratios == pytest.approx({1: 5.0, 2: 2.5})


def test_gates_are_not_judged_on_what_is_not_compared(store, compare):
    latency(store, add_sweep(store), "baseline", 0.01)
    latency(store, add_sweep(store, gpu={"driver": "590"}), "new", 0.03)
    gate = ("--fail-on", "decode_latency>1.05x")
    code, _, err = compare("baseline", "new", *gate)
    assert code == 2
    assert "gate decode_latency>1.05x cannot be judged (not compared: m new b1-p8-g2)" in err
    code, _, err = compare("baseline", "new", *gate, "--allow-different")
    assert code == 3
    assert "trips on m new b1-p8-g2: 0.01 -> 0.03 (3x" in err
    assert "(rows that should not be compared)" in err


@pytest.mark.parametrize(("right", "code"), [(79, 0), (78, 3)])
def test_what_lies_on_the_bound_is_not_beyond_it(store, compare, right, code):
    sweep = add_sweep(store)
    scored(store, sweep, "baseline", [1] * 80 + [0] * 20)
    scored(store, sweep, "new", [1] * right + [0] * (100 - right))
    assert compare("baseline", "new", "--fail-on", "acc<-0.01")[0] == code


def test_the_newest_comparable_pair_is_compared(store):
    old, new = add_sweep(store), add_sweep(store, versions={"torch": "2.12"})
    for sweep, seconds in ((old, 0.02), (new, 0.04)):
        latency(store, sweep, "baseline", seconds, key=f"baseline {sweep}")
        latency(store, sweep, "new", 0.01, key=f"new {sweep}")
    (row,) = compare_methods(store, "baseline", "new")
    assert (row.a, row.b, row.sweep_a, row.flags) == (pytest.approx(0.04), pytest.approx(0.01), new, ())


def test_what_one_device_allows_hides_nothing_of_another(store, compare):
    """Comparable on the one device, and not on the other: that is refused and told, not left out."""
    for device, drivers in {"a GPU": ("580.1", "580.1"), "another GPU": ("580.1", "590")}.items():
        for method, driver in zip(("baseline", "new"), drivers, strict=True):
            sweep = add_sweep(store, gpu={"driver": driver})
            key = variant_key(method, device=device)
            latency(store, sweep, method, 1.0, device_name=device, key=key)
    code, out, err = compare("baseline", "new", "--format", "json")
    assert code == 2
    assert [row["device"] for row in json.loads(out)] == ["a GPU"]
    assert "not compared: baseline and new differ in driver: 580.1 and 590 (b1-p8-g2)" in err
    sweep = add_sweep(store)
    for method in ("baseline", "new"):
        key = variant_key(method, device="another GPU")
        latency(store, sweep, method, 2.0, device_name="another GPU", key=key)
    rows = compare_methods(store, "baseline", "new")
    assert [(row.device, row.a) for row in rows] == [("another GPU", 2.0), ("a GPU", 1.0)]


def test_a_newer_cell_that_was_passed_over_is_named(store):
    old = add_sweep(store)
    latency(store, old, "baseline", 0.02)
    latency(store, old, "new", 0.01)
    newer = add_sweep(store, versions={"torch": "2.12"})
    latency(store, newer, "new", 0.005, key="new on 2.12")
    (row,) = compare_methods(store, "baseline", "new")
    assert row.b == pytest.approx(0.01)
    assert row.flags == (f"sweep {newer} measured b under other conditions",)


def test_all_items_are_better_evidence_than_the_first_ten(store):
    whole, quick = add_sweep(store), add_sweep(store, config={"limit": 10})
    for sweep, n in ((whole, 40), (quick, 10)):
        scored(store, sweep, "baseline", [1] * n)
        scored(store, sweep, "new", [1] * (n // 2) + [0] * (n - n // 2))
    (row,) = compare_methods(store, "baseline", "new")
    assert (row.n, row.flags) == (40, ())


def test_a_limit_of_both_is_flagged(store):
    quick = add_sweep(store, config={"limit": 10})
    scored(store, quick, "baseline", [1] * 10)
    scored(store, quick, "new", [1] * 10)
    (row,) = compare_methods(store, "baseline", "new")
    assert row.flags == ("limit 10",)
    assert row.verdict == "no clear difference"  # of ten items


def test_other_items_are_a_difference_even_where_nothing_else_is(store):
    sweep = add_sweep(store)
    scored(store, sweep, "baseline", [1] * 10)
    scored(store, sweep, "new", [1] * 8)
    with pytest.raises(ConfigError, match="items: 10 and 8 with 8 in common"):
        compare_methods(store, "baseline", "new")


# --- many at once -------------------------------------------------------------------------------------


def test_p_values_are_adjusted_over_the_whole_call(store, compare):
    rng = np.random.default_rng(0)
    sweep = add_sweep(store)
    base = rng.integers(0, 2, size=200)
    scored(store, sweep, "baseline", base)
    raw = {}
    for number, wrong in enumerate((4, 9, 14, 30)):
        outcomes = base.copy()
        outcomes[np.flatnonzero(base)[:wrong]] = 0
        scored(store, sweep, f"m{number}", outcomes)
        raw[f"m{number}"] = mcnemar(wrong, 0)
    rows = compare_methods(store, "baseline", list(raw))
    assert [row.p_raw for row in rows] == pytest.approx(list(raw.values()))
    assert [row.p for row in rows] == pytest.approx(benjamini_hochberg(list(raw.values())))
    assert {row.tests for row in rows} == {4}
    (alone,) = compare_methods(store, "baseline", "m0")
    assert (alone.p, alone.tests) == (pytest.approx(raw["m0"]), 1)
    assert [row.verdict for row in rows] == ["no clear difference", "worse", "worse", "worse"]

    code, out, _ = compare("baseline", "--all", "--format", "json")
    assert code == 0
    found = json.loads(out)
    assert [row["method_b"] for row in found] == list(raw)
    assert [row["p"] for row in found] == pytest.approx([row.p for row in rows])
    _, out, _ = compare("baseline", "m0,m1", "m3")
    assert "p is adjusted over 3 tests (Benjamini-Hochberg)" in out


def test_the_call_must_name_whom_to_judge(store, compare):
    latency(store, add_sweep(store), "baseline", 0.02)
    for arguments, message in (
        (("baseline",), "name the methods to compare with baseline, or give --all"),
        (("baseline", "x", "--all"), "give either the methods to judge or --all"),
        (("baseline", "baseline"), "baseline is compared with itself"),
        (("baseline", "nope"), "unknown method in this store"),
    ):
        code, _, err = compare(*arguments)
        assert code == 2
        assert message in err


def test_a_method_that_failed_everywhere_lets_no_gate_pass(store, compare):
    sweep = add_sweep(store)
    for method in ("baseline", "good"):
        scored(store, sweep, method, [1, 1, 0, 1])
    failed = {"status": Status.FAILED, "reason": "ValueError: boom"}
    add_cell(store, sweep, "broken", task="grammar", **failed)
    unfit = {"status": Status.NOT_APPLICABLE, "reason": "only for encoders"}
    add_cell(store, sweep, "unfit", task="grammar", **unfit)
    for judged in (["--all"], ["broken"]):
        code, _, err = compare("baseline", *judged, "--fail-on", "acc<-0.5")
        assert code == 3
        assert "missing in b: m broken grammar (failed: ValueError: boom)" in err
        assert "gate acc<-0.5 cannot be judged (missing in b: " in err
        assert "unfit" not in err, "what does not apply is not asked for"
        assert compare("baseline", *judged, "--fail-on", "acc<-0.5", "--allow-missing")[0] == 0


def test_what_was_measured_nowhere_near_a_is_not_among_all_the_others(store, compare):
    sweep = add_sweep(store)
    for method in ("baseline", "new"):
        latency(store, sweep, method, 0.02)
    latency(store, sweep, "elsewhere", 0.02, model="n")
    code, out, _ = compare("baseline", "--all", "--format", "json")
    assert code == 0
    assert {row["method_b"] for row in json.loads(out)} == {"new"}


def test_a_baseline_that_failed_is_no_unknown_name(store, compare):
    sweep = add_sweep(store)
    add_cell(store, sweep, "baseline", scenario=SHAPE, status=Status.OOM, reason="out of memory")
    latency(store, sweep, "new", 0.02)
    code, _, err = compare("baseline", "new")
    assert code == 2
    assert "nothing of baseline was measured: oom: out of memory" in err


def test_only_some_metrics(store):
    sweep = add_sweep(store)
    for method in ("baseline", "new"):
        latency(store, sweep, method, 0.02)
        scored(store, sweep, method, [1, 0, 1])
    assert [row.metric for row in compare_methods(store, "baseline", "new", metrics=["acc"])] == ["acc"]
    with pytest.raises(UnknownName, match="unknown compared metric 'accc'; did you mean 'acc'"):
        compare_methods(store, "baseline", "new", metrics=["accc"])


# --- what is said -------------------------------------------------------------------------------------


def test_windows_count_by_their_tokens(store):
    sweep = add_sweep(store)
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 500, size=30)
    losses = rng.normal(3, 0.5, size=30)
    for method, rise in (("baseline", 0.0), ("new", 0.1)):
        outcomes = losses + rise
        found = items(outcomes, "nll")
        found = [type(i)(i.index, i.metric, i.outcome, {"tokens": int(tokens[i.index])}) for i in found]
        record = Record("nll", float(np.average(outcomes, weights=tokens)), "nats/token", n=30)
        add_cell(store, sweep, method, record, task="kjv", items=found)
    (row,) = compare_methods(store, "baseline", "new")
    assert row.difference == pytest.approx(0.1)
    assert (row.test, row.n, row.basis, row.verdict) == ("sign flips", 30, "items", "worse")


def test_the_mean_over_subtasks_is_tested_as_such(store):
    """A group whose members count the same, whatever their size: items weigh by their member."""
    sweep = add_sweep(store)
    members = ["big"] * 90 + ["small"] * 10
    for method, wrong in (("baseline", ()), ("new", range(90, 96))):
        outcomes = [0.0 if index in wrong else 1.0 for index in range(100)]
        found = [
            type(i)(i.index, i.metric, i.outcome, {"task": members[i.index]})
            for i in items(outcomes)
        ]  # fmt: skip
        value = (np.mean(outcomes[:90]) + np.mean(outcomes[90:])) / 2
        add_cell(store, sweep, method, Record("acc", value, "fraction", n=100), task="group", items=found)
    (row,) = compare_methods(store, "baseline", "new")
    assert row.difference == pytest.approx(-0.3)
    assert row.lower < -0.3 < row.upper
    assert row.test == "sign flips"


def test_a_score_that_its_items_do_not_make_up_has_no_test(store):
    sweep = add_sweep(store)
    for method in ("baseline", "new"):
        add_cell(store, sweep, method, Record("f1", 0.9, "fraction"), task="t", items=items([1, 0], "f1"))
    (row,) = compare_methods(store, "baseline", "new")
    assert (row.p, row.lower, row.basis) == (None, None, None)


def test_divergence_is_tested_between_two_variants_and_not_against_the_baseline_itself(store):
    sweep = add_sweep(store)
    for method, kl in (("baseline", 0.0), ("x", 0.2), ("y", 0.1)):
        outcomes = [kl * (1 + 0.1 * (i % 5)) for i in range(20)]
        record = Record("mean_kl", float(np.mean(outcomes)), "nats/token", n=20)
        add_cell(store, sweep, method, record, task="kjv", items=items(outcomes, "mean_kl"))
    (row,) = compare_methods(store, "x", "y")
    assert (row.verdict, row.test) == ("better", "sign flips")
    (row,) = compare_methods(store, "baseline", "x")
    assert row.p is None
    assert row.difference == pytest.approx(0.24)


def test_json_names_everything_that_the_docs_name(store, compare):
    sweep = add_sweep(store)
    for method in ("baseline", "new"):
        latency(store, sweep, method, 0.02)
    _, out, _ = compare("baseline", "new", "--format", "json")
    (row,) = json.loads(out)
    assert list(row) == [
        "model", "cell", "metric", "unit", "a", "b", "ratio", "difference", "lower", "upper", "p", "test",
        "detectable", "method_a", "method_b", "kind", "seed", "dtype", "device", "p_raw", "tests", "n",
        "flips", "basis", "mode", "verdict", "flags", "differences", "sweep_a", "sweep_b", "side_a", "side_b",
    ]  # fmt: skip
    assert (row["basis"], row["verdict"], row["differences"]) == ("unpaired", "equal", [])


# --- shapes -------------------------------------------------------------------------------------------


def test_the_break_even_batch_size_of_two_methods(store, compare):
    sweep = add_sweep(store)
    for batch in (1, 4, 16):
        ratio = (batch / 4.5) ** 0.5
        for method, seconds in (("baseline", 0.01), ("new", 0.01 * ratio)):
            record = timed("decode_latency", around(seconds))
            add_cell(store, sweep, method, record, scenario=f"b{batch}-p8-g2")
    code, out, _ = compare("baseline", "new", "--break-even", "--format", "json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["outcome"] == "crosses"
    assert row["batch"] == pytest.approx(4.5, rel=0.02)
    assert row["lower"] < row["batch"] < row["upper"]
    assert row["says"] == "new is faster below it"
    assert set(row["bases"].values()) == {"unpaired"}
    _, table, _ = compare("baseline", "new", "--break-even")
    assert "new is faster below it" in table


def test_sizes_of_a_break_even_are_drawn_by_themselves(store, compare):
    # Readings that drift up at one size and down at the other: with one set of draws for both the crossing
    # would seem to stand still.
    sweep = add_sweep(store)
    drift = [1 + 0.02 * (i - 7) for i in range(15)]
    for shape, middle, drifting in (("b1-p8-g2", 1.25, drift), ("b64-p8-g2", 0.8, drift[::-1])):
        add_cell(store, sweep, "baseline", timed("decode_latency", around(middle)), scenario=shape)
        ratios = timed("decode_speedup", [middle * each for each in drifting], "x")
        add_cell(store, sweep, "new", timed("decode_latency", around(1.0)), ratios, scenario=shape)
    code, out, _ = compare("baseline", "new", "--break-even", "--format", "json")
    (row,) = json.loads(out)
    assert (code, set(row["bases"].values())) == (0, {"paired"})
    assert row["upper"] / row["lower"] > 2


def test_the_words_of_a_break_even_claim_no_more_than_its_intervals():
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 400))

    def said(*ratios):
        draws = [ratio * np.exp(each) for ratio, each in zip(ratios, noise, strict=True)]
        points = [Point(size, r, d) for size, r, d in zip((1, 64), ratios, draws, strict=True)]
        known = {
            point.size: (ratio * 0.96, ratio * 1.04) for point, ratio in zip(points, ratios, strict=True)
        }
        (found,) = break_even(points)
        return crossings_in_words(found, dict(zip((1, 64), ratios, strict=True)), "b", intervals=known)

    assert said(0.5, 2.0) == "b is faster below it"
    assert said(0.9999, 1.0001) == "not clear: b is faster below it, if it is there at all"
    assert said(0.998, 0.999) == "no clear difference at any measured batch size (1 to 64)"
    assert said(0.5, 0.99) == "b is faster at every measured batch size (1 to 64), not clearly at 64"
    assert said(0.5, 0.6) == "b is faster at every measured batch size (1 to 64)"


def test_a_break_even_across_drivers_is_refused(store, compare):
    for batch in (1, 4):
        latency_of = {"baseline": add_sweep(store), "new": add_sweep(store, gpu={"driver": "590"})}
        for method, sweep in latency_of.items():
            record = timed("decode_latency", around(0.01))
            add_cell(store, sweep, method, record, scenario=f"b{batch}-p8-g2")
    code, out, err = compare("baseline", "new", "--break-even", "--format", "json")
    assert (code, json.loads(out)) == (2, [])
    assert "not compared: baseline and new differ in driver: 580.1 and 590" in err
    assert compare("baseline", "new", "--break-even", "--allow-different")[0] == 0


def test_a_break_even_is_of_one_device(store, compare):
    """A newer reading on another device is no point of the first one's line."""
    for device, ratios in (("a GPU", {1: 0.5, 8: 0.8, 64: 0.9}), ("a CPU", {1: 3.0, 8: 2.0})):
        sweep = add_sweep(store, device_name=device)
        for batch, ratio in ratios.items():
            for method, seconds in (("baseline", 0.01), ("new", 0.01 * ratio)):
                record = timed("decode_latency", around(seconds))
                add_cell(store, sweep, method, record, scenario=f"b{batch}-p8-g2", device_name=device)
    code, out, _ = compare("baseline", "new", "--break-even", "--format", "json")
    rows = {row["device"]: row for row in json.loads(out)}
    assert code == 0
    assert {name: row["break_even"] for name, row in rows.items()} == {
        "a GPU": "above 64",
        "a CPU": "above 8",
    }
    assert list(rows["a GPU"]["ratios"]) == ["b1", "b8", "b64"]
    assert rows["a GPU"]["says"] == "new is faster at every measured batch size (1 to 64)"
    assert rows["a CPU"]["says"] == "new is slower at every measured batch size (1 to 8)"
    _, table, _ = compare("baseline", "new", "--break-even")
    assert "a GPU" in table
    assert "bfloat16" not in table


def test_sizes_of_a_break_even_under_other_conditions_are_flagged(store, compare):
    for batch, driver in ((1, "580"), (4, "590")):
        sweep = add_sweep(store, gpu={"driver": driver})
        for method in ("baseline", "new"):
            record = timed("decode_latency", around(0.01))
            add_cell(store, sweep, method, record, scenario=f"b{batch}-p8-g2")
    code, out, _ = compare("baseline", "new", "--break-even", "--format", "json")
    (row,) = json.loads(out)
    assert (code, row["flags"]) == (0, ["b1: driver: 580 and 590 at 4"])


def test_a_break_even_needs_two_batch_sizes(store, compare):
    sweep = add_sweep(store)
    for method in ("baseline", "new"):
        latency(store, sweep, method, 0.01)
    code, _, err = compare("baseline", "new", "--break-even")
    assert code == 2
    assert "--batch-sizes 1,8,64" in err


def scaling(path, capsys, *arguments):
    capsys.readouterr()
    code = run(["scaling", "--db", str(path), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_exponent_over_prompt_lengths(store, path, capsys):
    sweep = add_sweep(store)
    for length, mood in ((64, 1.0), (128, 1.5), (256, 0.7)):
        record = timed("prefill_latency", around(1e-6 * length**1.5 * mood))
        control = timed("control_latency", around(0.001 * mood))
        cache = Record("prefill_kv_cache_bytes", 100.0 * length, "B")
        add_cell(store, sweep, "new", record, control, cache, scenario=f"b1-p{length}-g2")
    code, out, _ = scaling(path, capsys, "--format", "json")
    assert code == 0
    rows = {row["metric"]: row for row in json.loads(out)}
    # The machine's mood differed from length to length; the control next to each takes it out.
    time = rows["prefill_latency"]
    assert time["basis"] == "control"
    assert time["fit"]["exponent"] == pytest.approx(1.5, abs=0.01)
    assert time["fit"]["lower"] < 1.5 < time["fit"]["upper"]
    assert [each["exponent"] for each in time["fit"]["local"]] == pytest.approx([1.5, 1.5], abs=0.01)
    assert rows["prefill_kv_cache_bytes"]["fit"]["exponent"] == pytest.approx(1.0)
    assert rows["prefill_kv_cache_bytes"]["fit"]["lower"] is None
    _, table, _ = scaling(path, capsys, "--metrics", "prefill_latency")
    assert "64 128 256" in table
    _, table, _ = scaling(path, capsys, "--format", "csv")
    assert table.splitlines()[0].split(",")[6:9] == ["exponent", "lower", "upper"]
    for option, kind in (
        ("--models", "timed model in this store"),
        ("--methods", "timed method in this store"),
        ("--metrics", "metric that grows with the prompt"),
    ):
        code, _, err = scaling(path, capsys, option, "nope")
        assert (code, f"unknown {kind}: 'nope'" in err) == (2, True)
    # An empty list asks for nothing, here as in `harness results`.
    assert json.loads(scaling(path, capsys, "--metrics", "", "--format", "json")[1]) == []


def test_lengths_taken_in_another_way_are_not_put_in_one_line(store, path, capsys):
    sweep, other = add_sweep(store), add_sweep(store, gpu={"driver": "590"})
    for length, where, mode in (
        (64, sweep, "graph"), (128, sweep, "graph"), (256, sweep, "graph"), (512, sweep, "eager"),
        (1024, other, "graph"),
    ):  # fmt: skip
        record = timed("prefill_latency", around(1e-6 * length), mode=mode)
        add_cell(store, where, "new", record, scenario=f"b1-p{length}-g2")
    (row,) = json.loads(scaling(path, capsys, "--format", "json")[1])
    assert list(row["values"]) == ["64", "128", "256"]
    assert row["note"] == "without 512: taken as eager; without 1024: measured under other conditions"
    assert row["fit"]["points"] == 3


def test_two_lengths_are_no_sweep(store, path, capsys):
    sweep = add_sweep(store)
    for length in (64, 128):
        add_cell(store, sweep, "new", Record("prefill_latency", 0.1, "s"), scenario=f"b1-p{length}-g2")
    code, _, err = scaling(path, capsys)
    assert code == 2
    assert "--prompt-lens 128,512,2048" in err
