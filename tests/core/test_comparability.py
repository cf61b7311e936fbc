"""What keeps two cells from being compared, as it is read from a store."""

from __future__ import annotations

import copy

import pytest

from harness.comparability import Scope, conditions_of, differences
from harness.conditions import facts_of, read_conditions
from harness.records import Record
from harness.store.store import Store
from tests.core.stores import END, MANIFEST, add_cell, add_sweep


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "results.db") as store:
        yield store


def two(store, first, second, *, variants=({}, {}), task=None):
    """The conditions of one cell of each of two sweeps."""
    shape = None if task else "b1-p8-g2"
    cells = [
        add_cell(store, sweep, method, Record("x", 1.0, "s"), task=task, scenario=shape, **changes)
        for sweep, method, changes in zip((first, second), ("a", "b"), variants, strict=True)
    ]
    found = read_conditions(store, cells)
    return found[cells[0]], found[cells[1]]


def named(store, first, second, scope, **given):
    return {each.name: (each.a, each.b) for each in differences(*two(store, first, second, **given), scope)}


def test_one_sweep_agrees_with_itself_and_with_its_like(store):
    first, second = add_sweep(store), add_sweep(store)
    for scope in Scope:
        assert differences(*two(store, first, second), scope) == ()
        assert differences(*two(store, first, first), scope) == ()


@pytest.mark.parametrize(
    ("changes", "scope", "expected"),
    [
        ({"measuring_version": 1}, Scope.QUALITY, {"measuring version": ("2", "1")}),
        ({"measuring_version": 1}, Scope.MEMORY, {"measuring version": ("2", "1")}),
        ({"versions": {"torch": "2.12"}}, Scope.QUALITY, {"torch version": ("2.11", "2.12")}),
        ({"versions": {"triton": "3.7"}}, Scope.TIMING, {"triton version": ("3.6", "3.7")}),
        ({"versions": {"triton": "3.7"}}, Scope.QUALITY, {}),
        ({"gpu": {"driver": "590"}}, Scope.TIMING, {"driver": ("580.1", "590")}),
        ({"gpu": {"driver": "590"}}, Scope.MEMORY, {}),
        ({"gpu": {"power_cap_w": 400.2}}, Scope.TIMING, {"power cap (W)": ("700", "400")}),
        ({"gpu": {"power_cap_w": 700.1}}, Scope.TIMING, {}),
        ({"gpu": {"sm_clock_max_mhz": 1410}}, Scope.TIMING, {"highest SM clock (MHz)": ("1980", "1410")}),
        ({"workload": {"jobs": 2}}, Scope.TIMING, {"variants at a time": ("1", "2")}),
        ({"workload": {"jobs": 2}}, Scope.QUALITY, {}),
        ({"environment": {"OMP_NUM_THREADS": "4"}}, Scope.TIMING, {"OMP_NUM_THREADS": ("unset", "4")}),
        ({"environment": {"OMP_NUM_THREADS": "4"}}, Scope.QUALITY, {}),
        ({"environment": {"GOMP_CPU_AFFINITY": "0"}}, Scope.TIMING, {"GOMP_CPU_AFFINITY": ("unset", "0")}),
        ({"environment": {"GOMP_CPU_AFFINITY": "0"}}, Scope.QUALITY, {}),
        ({"environment": {"MALLOC_ARENA_MAX": "1"}}, Scope.MEMORY, {"MALLOC_ARENA_MAX": ("unset", "1")}),
        (
            {"environment": {"ATEN_CPU_CAPABILITY": "default"}},
            Scope.QUALITY,
            {"ATEN_CPU_CAPABILITY": ("unset", "default")},
        ),
        ({"environment": {"PYTORCH_ALLOC_CONF": "x"}}, Scope.MEMORY, {"PYTORCH_ALLOC_CONF": ("unset", "x")}),
        ({"environment": {"PYTORCH_ALLOC_CONF": "x"}}, Scope.QUALITY, {}),
        (
            {"environment": {"NVIDIA_TF32_OVERRIDE": "0"}},
            Scope.QUALITY,
            {"NVIDIA_TF32_OVERRIDE": ("unset", "0")},
        ),
    ],
)
def test_each_condition_counts_for_what_it_changes(store, changes, scope, expected):
    assert named(store, add_sweep(store), add_sweep(store, **changes), scope) == expected


def test_clocks_are_those_seen_at_work(store):
    # Idle at the start, at work at the end: the faster look counts, and small steps do not.
    locked = copy.deepcopy(END)
    locked["gpu"]["sm_clock_mhz"] = 1200
    assert named(store, add_sweep(store), add_sweep(store, end=locked), Scope.TIMING) == {
        "SM clock seen (MHz)": ("1965", "1200")
    }
    locked["gpu"]["sm_clock_mhz"] = 1900
    assert named(store, add_sweep(store), add_sweep(store, end=locked), Scope.TIMING) == {}


def test_slowdowns_at_either_end_or_between_them_count_and_a_power_cap_does_not(store):
    hot = copy.deepcopy(END)
    hot["gpu"]["throttle_reasons"] = ["HwThermalSlowdown", "SwPowerCap"]
    assert named(store, add_sweep(store), add_sweep(store, end=hot), Scope.TIMING) == {
        "throttling": ("none", "HwThermalSlowdown")
    }
    start = {"violation_s": {"thermal": 100.0, "power": 0.0}}
    counted = copy.deepcopy(END)
    counted["gpu"]["violation_s"] = {"thermal": 160.0, "power": 300.0}  # 60 of 600 seconds
    assert named(store, add_sweep(store), add_sweep(store, end=counted, gpu=start), Scope.TIMING) == {
        "throttling": ("none", "thermal violations")
    }
    counted["gpu"]["violation_s"]["thermal"] = 101.0  # a moment
    assert named(store, add_sweep(store), add_sweep(store, end=counted, gpu=start), Scope.TIMING) == {}


@pytest.mark.parametrize("time", ["yesterday", 5, "2026-01-02T03:04:05"])  # of no zone
def test_a_time_that_is_none_is_no_time(store, time):
    broken = copy.deepcopy(END)
    broken["time_utc"] = time
    assert named(store, add_sweep(store), add_sweep(store, end=broken), Scope.TIMING) == {}


def test_threads_count_on_the_cpu_only(store):
    cpu = {"device": "cpu", "gpu": None}
    sweeps = [add_sweep(store, **cpu, workload={"threads": threads}) for threads in (8, 4)]
    assert named(store, *sweeps, Scope.TIMING) == {"CPU threads": ("8", "4")}
    sweeps = [add_sweep(store, workload={"threads": threads}) for threads in (8, 4)]
    assert named(store, *sweeps, Scope.TIMING) == {}


@pytest.mark.parametrize("limits", [(None, 10), (10, 20)])
def test_a_limit_is_a_difference_of_scores_and_of_nothing_else(store, limits):
    sweeps = [add_sweep(store, config={"limit": limit}) for limit in limits]
    shown = tuple("none" if limit is None else str(limit) for limit in limits)
    assert named(store, *sweeps, Scope.QUALITY, task="grammar") == {"limit of items": shown}
    assert named(store, *sweeps, Scope.TIMING) == {}


def test_changed_data_of_a_task_is_a_difference(store):
    sweeps = add_sweep(store), add_sweep(store, workload={"tasks": {"grammar": "rev-2"}})
    assert named(store, *sweeps, Scope.QUALITY, task="grammar") == {"task data": ("rev-1", "rev-2")}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"device_name": "another GPU"}, "device"),
        ({"model_identity": "sha256:2"}, "model files"),
    ],
)
def test_a_variant_of_other_files_type_or_device_differs_in_everything(store, changes, name):
    sweep = add_sweep(store)
    for scope in Scope:
        assert set(named(store, sweep, sweep, scope, variants=({}, changes))) == {name}


def test_budgets_count_for_variants_that_spent_them(store):
    budgets = [{"calibration": {"samples": samples, "len": 128, "text": "t" * 64}} for samples in (128, 32)]
    sweeps = [add_sweep(store, workload={"budget": budget}) for budget in budgets]
    assert named(store, *sweeps, Scope.QUALITY, task="grammar") == {}
    for sweep, method in zip(sweeps, ("a", "b"), strict=True):
        add_cell(store, sweep, method, Record("calibration_tokens", 1000.0, "tokens"))
    assert named(store, *sweeps, Scope.QUALITY, task="grammar") == {
        "calibration budget": ("samples 128, len 128, text tttttttt", "samples 32, len 128, text tttttttt")
    }


def test_budgets_count_for_the_cost_of_making_a_variant(store):
    budgets = [{"calibration": {"samples": n}, "training": {"steps": 10 * n}} for n in (128, 32)]
    made = []
    for budget in budgets:
        tokens = [Record("calibration_tokens", 1000.0, "tokens"), Record("trained_tokens", 1000.0, "tokens")]
        sweep = add_sweep(store, workload={"budget": budget})
        cost = Record("transform_s", 1.0, "s"), Record("transform_peak_bytes", 1.0, "B")
        made.append(add_cell(store, sweep, "a", *cost, *tokens))
        made.append(add_cell(store, sweep, "a", Record("decode_latency", 1.0, "s"), scenario="b1-p8-g2"))
    found = read_conditions(store, made)
    expected = {
        "calibration budget": ("samples 128", "samples 32"),
        "training budget": ("steps 1280", "steps 320"),
    }
    for scope in (Scope.TIMING, Scope.MEMORY):
        differ = differences(found[made[0]], found[made[2]], scope)
        assert {each.name: (each.a, each.b) for each in differ} == expected
        assert differences(found[made[1]], found[made[3]], scope) == ()


def test_modes_are_compared_without_what_was_taken(store):
    a, b = two(store, add_sweep(store), add_sweep(store))
    (found,) = differences(a, b, Scope.TIMING, ("graph", "eager"))
    assert str(found) == "mode: graph and eager"
    assert differences(a, b, Scope.TIMING, ("graph, simulated", "graph")) == ()
    assert differences(a, b, Scope.TIMING, ("graph", None)) == ()


def test_what_was_not_recorded_differs_from_nothing(store):
    old = store.open_sweep(command="c", config={}, manifest={"device": "cuda"}, cells_planned=1)
    assert named(store, old, add_sweep(store), Scope.TIMING) == {}
    assert facts_of({}, {}, None).facts["throttled"] is None


def test_a_group_names_the_cells_of_each_value(store):
    sweeps = [add_sweep(store), add_sweep(store), add_sweep(store, gpu={"driver": "590"})]
    cells = [
        add_cell(store, sweep, method, Record("x", 1.0, "s"), scenario="s")
        for sweep, method in zip(sweeps, "abc", strict=True)
    ]
    rows = read_conditions(store, cells).values()
    assert dict(conditions_of(rows, Scope.TIMING)) == {"driver": {"580.1": cells[:2], "590": cells[2:]}}
    assert dict(conditions_of(rows, Scope.QUALITY)) == {}
    prints = [row.fingerprint(Scope.TIMING) for row in rows]
    assert prints[0] == prints[1] != prints[2]


def test_a_real_sweep_records_what_the_guard_asks_for():
    from harness.measure.machine import manifest

    found = facts_of({}, manifest("cpu"), None)
    missing = {name for name, value in found.facts.items() if value is None}
    # Of a GPU, of the workload, and of packages that a CPU build has not.
    assert missing <= {
        "driver", "power_cap_w", "sm_clock_max_mhz", "memory_clock_max_mhz", "sm_clock_set_mhz",
        "memory_clock_set_mhz", "sm_clock_seen_mhz", "ecc", "throttled", "cuda", "cudnn", "triton",
        "threads", "jobs",
    }  # fmt: skip
    assert found.environment is not None
    assert set(MANIFEST) <= {*manifest("cpu"), "workload"}
