"""Comparing two methods, the comparisons that are stored, and gates."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from harness.cli.app import run
from harness.comparing import (
    Stores,
    compare_methods,
    compare_sides,
    judged,
    load_side,
    parse_gate,
    parse_side,
)
from harness.derive import Derivation, baseline_records
from harness.errors import ConfigError, UnknownName
from harness.records import CellKind, CellResult, Item, Record, Status
from harness.store.store import Store, VariantRow


def _variant(method, device_name="cpu x"):
    return VariantRow(
        key=f"v-{method}-{device_name}",
        model="m",
        model_identity="i",
        method=method,
        chain=[{"name": method, "options": {}}],
        family="other",
        seed=0,
        dtype="float32",
        device="cpu",
        device_name=device_name,
        synthetic=False,
        model_info={},
    )


def _items(outcomes, metric="acc"):
    return tuple(Item(index, metric, outcome) for index, outcome in enumerate(outcomes))


A = [1.0] * 60 + [0.0] * 40
B = [1.0] * 50 + [0.0] * 45 + [1.0] * 5


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        sweep = store.open_sweep(command="c", config={}, manifest={"device": "cpu"}, cells_planned=4)
        for method, latency, outcomes in (("a", 0.010, A), ("b", 0.020, B)):
            variant = _variant(method)
            store.write_variant(sweep, variant)
            samples = tuple(latency * (1 + 0.01 * (i % 5 - 2)) for i in range(25))
            store.write_cell(
                sweep,
                CellResult(
                    f"{method}-s",
                    variant.key,
                    Status.OK,
                    records=(
                        Record("decode_latency", latency, "s", n=25, samples=samples),
                        Record("weight_bytes", 100.0 if method == "a" else 25.0, "B"),
                    ),
                ),
                kind=CellKind.SCENARIO,
                task=None,
                scenario="b1-p8-g2",
            )
            store.write_cell(
                sweep,
                CellResult(
                    f"{method}-t",
                    variant.key,
                    Status.OK,
                    records=(Record("acc", sum(outcomes) / 100, "fraction", n=100),),
                    items=_items(outcomes),
                ),
                kind=CellKind.TASK,
                task="grammar",
                scenario=None,
            )
        yield store


def test_times_are_ratios_with_an_interval_and_quality_is_paired(store):
    found = {each.metric: each for each in compare_methods(store, "a", "b")}
    latency = found["decode_latency"]
    assert latency.ratio == pytest.approx(2.0)
    assert latency.lower < 2.0 < latency.upper
    assert latency.upper - latency.lower < 0.1
    assert found["weight_bytes"].ratio == pytest.approx(0.25)
    accuracy = found["acc"]
    assert accuracy.difference == pytest.approx(-0.05)
    # 10 items only a has right, 5 only b: the exact binomial test.
    by_hand = 2 * sum(math.comb(15, k) for k in range(6)) / 2**15
    assert accuracy.p == pytest.approx(by_hand)
    assert accuracy.detectable > 0.05
    assert accuracy.ratio is None


def test_rows_of_different_devices_are_never_compared(store):
    other = _variant("c", device_name="another machine")
    sweep = store.open_sweep(command="c", config={}, manifest={"device": "cpu"}, cells_planned=1)
    store.write_variant(sweep, other)
    store.write_cell(
        sweep,
        CellResult("c-s", other.key, Status.OK, records=(Record("decode_latency", 0.001, "s"),)),
        kind=CellKind.SCENARIO,
        task=None,
        scenario="b1-p8-g2",
    )
    with pytest.raises(ConfigError, match="a and c differ in device: cpu x and another machine"):
        compare_methods(store, "a", "c")


def test_an_unknown_method_is_named(store):
    with pytest.raises(UnknownName, match="'d'"):
        compare_methods(store, "a", "d")


def judge(tmp_path, *texts, a="a", b="b"):
    """What gates say of two sides of the store in a folder."""
    with Stores(str(tmp_path / "results.db")) as stores:
        sides = [load_side(parse_side(text), stores) for text in (a, b)]
        found = compare_sides(sides[0], sides[1:])
    return judged([parse_gate(text) for text in texts], found.rows, found)


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        ("decode_latency>1.05x", True),
        ("decode_latency>2.5x", False),
        ("decode_latency<0.9x", False),
        ("weight_bytes<0.5x", True),
        ("acc<-0.01", True),
        ("acc<-0.1", False),
        ("decode_latency>0.005", True),
    ],
)
def test_gates(store, tmp_path, text, trips):
    (outcome,) = judge(tmp_path, text)
    assert bool(outcome.trips) is trips
    assert outcome.says == ("trips" if trips else "passes")


@pytest.mark.parametrize("text", ["acc", "acc=1", ">1", "acc>x", "acc > 1 x y"])
def test_a_malformed_gate_is_refused(text):
    with pytest.raises(ConfigError, match="--fail-on"):
        parse_gate(text)


def test_a_gate_on_nothing_is_refused(store, tmp_path):
    with pytest.raises(UnknownName, match="decode_latency"):
        judge(tmp_path, "decode_latenzy>1x")


def test_the_command_exits_with_3_when_a_gate_trips(store, tmp_path, capsys):
    database = ("--db", str(tmp_path / "results.db"))
    assert run(["compare", "a", "b", *database, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["metric"] for row in rows} == {"decode_latency", "weight_bytes", "acc"}
    assert run(["compare", "a", "b", *database, "--fail-on", "decode_latency>1.05x"]) == 3
    assert "gate decode_latency>1.05x trips on m b b1-p8-g2" in capsys.readouterr().err


def test_what_is_stored_beside_the_baseline():
    records = {r.metric: r for r in baseline_records(_items(A), _items(B))}
    assert records["flips"].value == pytest.approx(0.15)
    assert records["acc_difference"].value == pytest.approx(-0.05)
    assert records["acc_difference"].lower < -0.05 < records["acc_difference"].upper
    losses = baseline_records(_items([2.0, 3.0, 4.0], "nll"), _items([2.1, 3.3, 4.2], "nll"))
    rise, p, detectable = losses
    assert (p.metric, p.unit) == ("nll_rise_p", "p")
    assert p.value == pytest.approx(2 / 2**3)  # three losses: one of eight patterns, both ways
    assert detectable.metric == "nll_rise_detectable"
    assert (rise.metric, rise.unit) == ("nll_rise", "nats/token")
    assert rise.value == pytest.approx(0.2)
    assert 0 < rise.lower <= 0.2 <= rise.upper


def test_one_item_has_no_interval():
    for metric, values in {"acc": (1.0, 0.0), "nll": (2.0, 2.5)}.items():
        difference = baseline_records(_items(values[:1], metric), _items(values[1:], metric))[0]
        assert difference.value == values[1] - values[0]
        assert (difference.lower, difference.upper) == (None, None)


def test_a_group_whose_members_count_the_same_is_stored_so_too(tmp_path):
    """Its score is the mean of its members' shares, and its difference is that of the scores."""
    sizes = {"small": 10, "large": 90}

    def scored(small, large):
        rights = [*((1.0,) * small + (0.0,) * (10 - small)), *((1.0,) * large + (0.0,) * (90 - large))]
        tasks = [task for task, size in sizes.items() for _ in range(size)]
        found = [Item(i, "acc", value, {"task": tasks[i]}) for i, value in enumerate(rights)]
        return found, Record("acc", (small / 10 + large / 90) / 2, "fraction", n=100)

    sides = {"baseline": scored(8, 45), "other": scored(3, 54)}
    with Store.open(tmp_path / "results.db") as store:
        sweep = store.open_sweep(command="c", config={}, manifest={}, cells_planned=2)
        variants, ids = [], {}
        for method, (items, score) in sides.items():
            store.write_variant(sweep, _variant(method))
            result = CellResult(method, _variant(method).key, Status.OK, records=(score,), items=tuple(items))
            ids[method] = store.write_cell(sweep, result, kind=CellKind.TASK, task="group", scenario=None)
            cell = SimpleNamespace(kind=CellKind.TASK, key=method, task=SimpleNamespace(name="group"))
            variants.append(
                SimpleNamespace(
                    cells=[cell],
                    model=SimpleNamespace(info=SimpleNamespace(label="m")),
                    seed=0,
                    chain=SimpleNamespace(is_baseline=method == "baseline"),
                )
            )
        derivation = Derivation(store, SimpleNamespace(variants=variants))
        for method, cell_id in ids.items():
            derivation.stored(method, cell_id, Status.OK)
        records = store.records(ids["other"])
    difference = records["acc_difference"]
    assert difference.value == pytest.approx((3 / 10 + 54 / 90 - 8 / 10 - 45 / 90) / 2)  # not (57 - 53) / 100
    assert difference.lower < difference.value < difference.upper
    assert records["acc_difference_p"].note == "sign flips, not adjusted"


def test_other_items_are_not_compared():
    with pytest.raises(ConfigError, match="not scored on the same data"):
        baseline_records(_items(A), _items(A[:50]))
