"""The command that compares the engine's speed with lm-eval's, and the one that shows fixed costs."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from harness import fixed_cost
from harness.errors import ConfigError
from harness.evaluate import bench
from harness.fixed_cost import CellTime, FixedCost, fixed_costs, read_cell_times


@pytest.mark.parametrize("model", ["scratch:llama-nano", "shape:llama-15m"])
def test_both_are_timed_and_compared_in_one_run(model, capsys):
    small = ["--items", "6", "--batch-sizes", "1,4", "--search-share", "0.5", "--repeats", "2"]
    bench.main(["--tasks", "grammar", "--model", model, *small])
    printed = capsys.readouterr().out
    assert "6 items, 12 requests" in printed
    assert len(re.findall(r"^HFLM, batch +[14]: +[\d.]+ items/s on 3 items$", printed, re.M)) == 2
    runs = re.findall(r"^HFLM, batch [14]: .* engine: .* \| ([\d.]+)x$", printed, re.M)
    (ratio,) = re.findall(r"^items per second: ([\d.]+) times", printed, re.M)
    assert len(runs) == 2
    assert min(map(float, runs)) - 0.01 <= float(ratio) <= max(map(float, runs)) + 0.01
    (error,) = re.findall(r"difference of a log-likelihood: (\S+) nats", printed)
    assert float(error) < 1e-3
    assert "greedy flags that differ: 0 of 12" in printed


def cell(variant, at_s, seconds, making_s=0.0):
    begun = datetime(2024, 1, 1, tzinfo=UTC)
    return CellTime(variant, begun + timedelta(seconds=at_s), seconds, making_s)


def test_fixed_costs_are_what_is_left_between_two_variants():
    times = [
        cell("a", 10, 0, making_s=3),
        cell("a", 10, 5),
        cell("b", 18.5, 0, making_s=2.5),  # 15 to 18.5, 2.5 of it making
        cell("b", 19, 1),
        cell("c", 22, 0, making_s=1.5),  # 18.5 to 22: 1 measuring, 1.5 making
    ]
    expected = [FixedCost("b", 1.0), FixedCost("c", 1.0)]
    assert fixed_costs(times[::-1]) == expected
    assert fixed_costs([]) == fixed_costs(times[:2]) == []


def test_what_making_took_before_it_failed_counts_once():
    failed = [cell("a", 10, 6), cell("a", 10, 6.001), cell("a", 10, 6)]  # every cell says how long it was
    (found,) = fixed_costs([*failed, cell("b", 18, 0, making_s=1)])
    assert found.fixed_s == pytest.approx(1, abs=0.01)


def test_fixed_costs_come_from_the_store(tmp_path, capsys):
    from harness.store.store import Store

    with Store.open(tmp_path / "results.db") as store:
        with pytest.raises(ConfigError, match="no such sweep"):
            read_cell_times(store)
        store.open_sweep(command="", config={"jobs": 2}, manifest={}, cells_planned=0)
        with pytest.raises(ConfigError, match="several workers"):
            read_cell_times(store)
        store.open_sweep(command="", config={"jobs": 1}, manifest={}, cells_planned=0)
        assert read_cell_times(store) == []
    fixed_cost.main([str(tmp_path / "results.db")])
    assert capsys.readouterr().out == ""
