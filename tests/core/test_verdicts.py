"""Verdicts are written once a cell and its baseline's are stored, in either order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from harness.measure.ceilings import Ceilings
from harness.records import (
    CellKind,
    CellResult,
    KernelUse,
    ModuleEffect,
    Record,
    Scenario,
    Status,
    VariantReport,
)
from harness.store.store import Store
from harness.verdicts import FINE, Verdicts
from tests.store.rows import begin_sweep, make_variant

SHAPE = Scenario(1, 8, 2)


def plan(key, is_baseline):
    cells = (
        SimpleNamespace(key=f"{key}-transform", kind=CellKind.TRANSFORM, scenario=None),
        SimpleNamespace(key=f"{key}-timed", kind=CellKind.SCENARIO, scenario=SHAPE),
        SimpleNamespace(key=f"{key}-task", kind=CellKind.TASK, scenario=None),
    )
    return SimpleNamespace(
        key=key,
        model=SimpleNamespace(info=SimpleNamespace(label="m")),
        chain=SimpleNamespace(is_baseline=is_baseline),
        seed=0,
        dtype="float32",
        cells=cells,
    )


@pytest.fixture
def written(tmp_path):
    """Store cells in the order asked for; returns what the store then knows of the variant's cell."""
    with Store.open(tmp_path / "results.db") as store:
        grid = SimpleNamespace(variants=(plan("base", True), plan("slow", False)))

        def run(*order, status=Status.OK, seconds=4.0):
            sweep = begin_sweep(store, make_variant("base", method="baseline"), make_variant("slow"))
            effect = ModuleEffect("a", "Linear", True, "float32", 8, 32, 32, 32.0, 0.5)
            store.write_effects("slow", VariantReport("slow", (effect,)))
            verdicts = Verdicts(store, grid, Ceilings())
            ids = {}
            for key in order:
                variant, _, what = key.partition("-")
                timed = what == "timed"
                time = seconds if variant == "slow" else 1.0
                records = [Record("decode_latency", time, "s", time * 0.9, time * 1.1, mode="cpu")]
                records.append(Record("weight_bytes", 32.0, "B"))
                result = CellResult(
                    key,
                    variant,
                    status if variant == "slow" else Status.OK,
                    records=tuple(records) if timed else (Record("parameters_changed_share", 0.5, "1"),),
                    kernels=(KernelUse("decode", "aten::mm", "gemm", 1, time, 1.0),) if timed else (),
                )
                kind = CellKind.SCENARIO if timed else CellKind.TRANSFORM
                scenario = SHAPE.label if timed else None
                ids[key] = store.write_cell(sweep, result, kind=kind, task=None, scenario=scenario)
                verdicts.stored(key, ids[key], result.status)
            return {key: store.records(id_).get("verdict") for key, id_ in ids.items()}

        yield run


@pytest.mark.parametrize(
    "order", [("base-timed", "slow-transform", "slow-timed"), ("slow-transform", "slow-timed", "base-timed")]
)
def test_a_verdict_is_a_record_of_the_variants_cell_with_its_words(written, order):
    found = written(*order)
    verdict = found["slow-timed"]
    assert (verdict.value, verdict.unit) == (1.0, "1")
    assert verdict.note.startswith("Decode takes 4× [")
    assert "sparsity is only a mask: 50% of the weights" in verdict.note
    assert found["base-timed"] is None
    assert found["slow-transform"] is None


def test_without_a_baseline_or_where_the_cell_failed_there_is_none(written):
    assert written("slow-timed")["slow-timed"] is None
    failed = written("base-timed", "slow-timed", status=Status.FAILED)
    assert failed["slow-timed"] is None


def test_what_needs_no_explanation_says_so(written, monkeypatch):
    monkeypatch.setattr("harness.measure.verdict.SMALLER", 1.5)  # so that equal bytes count as smaller
    verdict = written("base-timed", "slow-timed", seconds=0.5)["slow-timed"]
    assert (verdict.value, verdict.note) == (0.0, FINE)
