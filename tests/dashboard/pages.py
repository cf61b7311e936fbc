"""Stores for the pages Scaling, Method, Sweep and Environment, and drawing a page without a server."""

from __future__ import annotations

from harness.records import CellKind, CellResult, ModuleEffect, Record, Status, VariantReport
from harness.store.store import VariantRow
from tests.core.stores import add_cell, add_sweep, around, items, timed
from tests.dashboard.filling import HOSTILE

__all__ = ["draw", "fill_quality", "fill_scaling", "texts"]

LENGTHS, BATCHES = (128, 512, 2048), (1, 8, 64)


def draw(view, path, monkeypatch, **address):
    """The page of a store, drawn by Streamlit's own test runner."""
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("HARNESS_DB", str(path))
    app = AppTest.from_string(
        f"from harness_dashboard.views import {view}\n{view}.render()", default_timeout=60
    )
    for key, value in address.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, [error.value for error in app.exception]
    return app


def texts(app):
    """What a page says through elements that read Markdown."""
    return [each.value for kind in ("markdown", "caption", "info", "title", "subheader", "success", "warning",
                                    "error") for each in getattr(app, kind)]  # fmt: skip


def scenario_records(batch, length, slope, offset_s):
    seconds = offset_s + slope * length * (1 + batch / 8)
    return (
        timed("prefill_latency", around(seconds)),
        timed("decode_latency", around(0.002)),
        timed("control_latency", around(0.001)),
        Record("prefill_peak_bytes", float(1000 * length * batch), "B"),
        Record("prefill_kv_cache_bytes", float(64 * length * batch), "B"),
    )


def fill_scaling(store):
    """A baseline that grows quickly from nothing, a method that grows slowly from an overhead."""
    sweep = add_sweep(store)
    for method, slope, offset_s in (("baseline", 1e-5, 0.0), ("window", 4e-6, 0.004)):
        for length in LENGTHS:
            for batch in BATCHES:
                label = f"b{batch}-p{length}-g16"
                add_cell(
                    store, sweep, method, *scenario_records(batch, length, slope, offset_s), scenario=label
                )
    add_cell(store, sweep, "short", *scenario_records(1, 128, 1e-5, 0.0), scenario="b1-p128-g16")
    add_cell(store, sweep, HOSTILE, *scenario_records(1, 128, 1e-5, 0.0), scenario="b1-p128-g16")
    add_cell(
        store, sweep, "baseline", *scenario_records(1, 128, 1e-5, 0.0), scenario="b1-p128-g16", model="n"
    )


def effect(bits, sparsity, *, changed=True, parameters=1000):
    return ModuleEffect(
        "layer", "Linear", changed, "int8", parameters, 2 * parameters, parameters, bits, sparsity
    )


def fill_quality(store):
    """Variants of an installed method, of a chain, and of one that nobody here knows, with their baseline."""
    sweep = add_sweep(store)
    right = [True] * 60 + [False] * 40
    variants = (
        ("baseline", ("baseline",), "baseline", 16.0, 0.0, right, ()),
        ("gptq:bits=4", ("gptq",), "quantization", 4.25, 0.0, [*right[:-2], True, False],
         (Record("acc_difference", -0.02, "fraction", -0.05, 0.01, 100),)),
        ("smoothquant+gptq", ("smoothquant", "gptq"), "quantization", 4.5, 0.0, right, ()),
        ("unheard-of", ("unheard-of",), "other", 16.0, 0.5, right, ()),
        (HOSTILE, ("gptq",), "quantization", 3.25, 0.0, right, ()),
    )  # fmt: skip
    for label, steps, family, bits, sparsity, outcomes, derived in variants:
        chain = [{"name": name, "options": {"bits": 4, "note": HOSTILE}} for name in steps]
        share = sum(outcomes) / len(outcomes)
        records = (Record("acc", share, "fraction", share - 0.1, share + 0.1, 100), *derived)
        add_cell(
            store, sweep, label, *records, task="grammar", items=items(outcomes),
            chain=chain, family=family, key=label,
        )  # fmt: skip
        # The second module is untouched and ten times as large: it must not count.
        report = VariantReport(
            label, (effect(bits, sparsity), effect(16.0, 0.0, changed=False, parameters=10_000)), False
        )
        store.write_effects(label, report)
    return sweep


def add_failures(store, sweep, model="m"):
    """A cell of each kind of ending, with hostile texts."""
    for number, status in enumerate(Status):
        key = f"{status}-{number}"
        store.write_variant(sweep, VariantRow(
            key, model, "sha256:1", f"method-{status}", [{"name": "x", "options": {}}], "other", 0,
            "bfloat16", "cuda", "a GPU", False, {},
        ))  # fmt: skip
        texts_ = {} if status is Status.OK else {"traceback": f"Traceback\n{HOSTILE}", "log_tail": HOSTILE}
        reason = None if status is Status.OK else f"{status}: {HOSTILE}"
        result = CellResult(f"{key}/c", key, status, reason, seconds=1.0, **texts_)
        store.write_cell(sweep, result, kind=CellKind.TASK, task="grammar", scenario=None)
