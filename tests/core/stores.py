"""Stores with a few cells, for what compares them."""

from __future__ import annotations

from harness.keys import content_key
from harness.records import CellKind, CellResult, Item, Record, Status
from harness.store.store import VariantRow

MANIFEST = {
    "measuring_version": 2,
    "device": "cuda",
    "device_name": "a GPU",
    "cpu": "a processor",
    "versions": {"torch": "2.11", "transformers": "5.17", "triton": "3.6", "transformer-harness": "1.0"},
    "gpu": {
        "driver": "580.1",
        "power_cap_w": 700.0,
        "sm_clock_mhz": 345,
        "sm_clock_max_mhz": 1980,
        "throttle_reasons": ["GpuIdle"],
    },
    "environment": {},
    "workload": {"threads": 8, "jobs": 1, "tasks": {"grammar": "rev-1"}, "budget": {}},
    "time_utc": "2026-01-01T00:00:00+00:00",
}
END = {
    "gpu": {"sm_clock_mhz": 1965, "throttle_reasons": ["SwPowerCap"]},
    "time_utc": "2026-01-01T00:10:00+00:00",
}


def add_sweep(store, config=None, end=END, **changes):
    """A sweep under `MANIFEST`; a dict changes the entries of a dict."""
    manifest = {
        name: {**value, **changes[name]} if isinstance(changes.get(name), dict) else changes.get(name, value)
        for name, value in MANIFEST.items()
    }  # fmt: skip
    sweep = store.open_sweep(command="c", config=config or {}, manifest=manifest, cells_planned=1)
    store.close_sweep(sweep, "finished", end)
    return sweep


def variant_key(method, **changes):
    return content_key([method, sorted(changes.items())])


def cell_key(variant, sweep, task=None, scenario=None):
    return content_key([variant, task, scenario, sweep])


def add_cell(
    store,
    sweep,
    method,
    *records,
    task=None,
    scenario=None,
    items=(),
    status=Status.OK,
    reason=None,
    **changes,
):
    """A cell of a variant of model `m`; returns its id."""
    values = {
        "key": variant_key(method, **changes),
        "model": "m",
        "model_identity": "sha256:1",
        "method": method,
        "chain": [{"name": method, "options": {}}],
        "family": "baseline" if method == "baseline" else "other",
        "seed": 0,
        "dtype": "bfloat16",
        "device": "cuda",
        "device_name": "a GPU",
        "synthetic": False,
        "model_info": {},
    }
    variant = VariantRow(**{**values, **changes})
    store.write_variant(sweep, variant)
    kind = CellKind.TASK if task else CellKind.SCENARIO if scenario else CellKind.TRANSFORM
    key = cell_key(variant.key, sweep, task, scenario)
    result = CellResult(key, variant.key, status, reason, records=records, items=tuple(items))
    return store.write_cell(sweep, result, kind=kind, task=task, scenario=scenario)


def items(outcomes, metric="acc", **detail):
    return tuple(Item(index, metric, float(value), detail) for index, value in enumerate(outcomes))


def timed(metric, samples, unit="s", mode="graph"):
    """A record with its readings."""
    ordered = sorted(samples)
    return Record(metric, ordered[len(ordered) // 2], unit, n=len(samples), samples=tuple(samples), mode=mode)


def around(value, n=15, spread=0.01):
    """Readings about a value, the same each time."""
    return [value * (1 + spread * ((7 * i) % n - n // 2) / n) for i in range(n)]
