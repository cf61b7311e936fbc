"""Small values to write into stores."""

from __future__ import annotations

from harness.records import CellKind, CellResult, Item, Record, Status
from harness.store.store import VariantRow


def make_variant(key="variant-a", **changes):
    values = {
        "key": key,
        "model": "zoo:llama-6m",
        "model_identity": "sha256:0123",
        "method": "gptq:bits=3",
        "chain": [{"name": "gptq", "options": {"bits": 3, "group_size": 128}}],
        "family": "quantization",
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "device_name": "a processor",
        "synthetic": False,
        "model_info": {"num_layers": 2},
    }
    return VariantRow(**{**values, **changes})


def make_item(index):
    return Item(index, "acc", float(index != 2), {"ll": [-1.5, -2.5]})


def make_result(key="cell-a", variant_key="variant-a", status=Status.OK, **changes):
    values = {
        "records": (
            Record("acc", 0.75, "fraction", lower=0.5, upper=0.9, n=4),
            Record("latency", 0.002, "s", n=3, samples=(0.001, 0.002, 0.003), mode="eager"),
        ),
        "items": tuple(make_item(index) for index in range(4)),
        "started_at": "2026-01-02T03:04:05.678+00:00",
        "seconds": 1.25,
    }
    return CellResult(key, variant_key, status, **{**values, **changes})


def begin_sweep(store, *variants, **changes):
    values = {
        "command": "harness sweep",
        "config": {"methods": ["gptq"]},
        "manifest": {"device": "cpu", "cpu": "a processor", "commit": "abc"},
        "cells_planned": 1,
    }
    sweep = store.open_sweep(**{**values, **changes})
    for variant in variants or (make_variant(),):
        store.write_variant(sweep, variant)
    return sweep


def write_task(store, sweep, result, task="hellaswag"):
    return store.write_cell(sweep, result, kind=CellKind.TASK, task=task, scenario=None)
