"""Under what each cell was measured, as it is stored, and what a sweep stores of it.

The facts come from the manifest of the sweep that measured a cell (at its start and its end), its
configuration, and the variant. What they mean for a comparison is decided in `harness.comparability`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from harness.comparability import Conditions
from harness.records import CellKind
from harness.store.chunks import chunks
from harness.store.tables import cells, records, sweeps, variants

if TYPE_CHECKING:
    from harness.planning import SweepPlan
    from harness.store.store import Store

__all__ = ["facts_of", "read_conditions", "workload"]

_SLOWDOWNS = ("HwSlowdown", "HwThermalSlowdown", "SwThermalSlowdown", "HwPowerBrakeSlowdown")
_VIOLATIONS = ("thermal",)  # a cap of power or voltage holds clocks down in normal operation too
_VIOLATION_SHARE = 0.01  # of the sweep's time; less is a moment that no median notices


def workload(plan: SweepPlan) -> dict[str, Any]:
    """What a sweep's manifest says beside the machine: threads, tasks' data, budgets."""
    from harness.planning import threads_per_worker

    tasks = {cell.task.name: cell.task.revision for cell in plan.grid.cells if cell.task is not None}
    return {
        "threads": threads_per_worker(plan.config.jobs),
        "jobs": plan.config.jobs,
        "tasks": tasks,
        "budget": plan.budget.identity(),
    }


def read_conditions(store: Store, cell_ids: Iterable[int]) -> dict[int, Conditions]:
    """The conditions of cells, by their ids."""
    wanted = sorted({int(cell) for cell in cell_ids})
    query = select(
        cells.c.id, cells.c.sweep_id, cells.c.kind, cells.c.task, cells.c.variant_id,
        variants.c.model_identity, variants.c.dtype, variants.c.device, variants.c.device_name,
        variants.c.simulated, variants.c.synthetic,
    ).join(variants, cells.c.variant_id == variants.c.id)  # fmt: skip
    budgets = (
        select(cells.c.variant_id, records.c.metric)
        .join(records, records.c.cell_id == cells.c.id)
        .where(records.c.metric.in_(["calibration_tokens", "trained_tokens"]), records.c.value > 0)
    )
    with store.reading() as connection:
        rows = [
            row for chunk in chunks(wanted) for row in connection.execute(query.where(cells.c.id.in_(chunk)))
        ]
        sweep_ids = sorted({row.sweep_id for row in rows})
        columns = (sweeps.c.id, sweeps.c.config, sweeps.c.manifest, sweeps.c.manifest_end)
        found = connection.execute(select(*columns).where(sweeps.c.id.in_(sweep_ids)))
        about = {row.id: facts_of(row.config or {}, row.manifest or {}, row.manifest_end) for row in found}
        about_variants = sorted({row.variant_id for row in rows})
        spent = {
            (variant, metric)
            for chunk in chunks(about_variants)
            for variant, metric in connection.execute(budgets.where(cells.c.variant_id.in_(chunk)))
        }
    return {row.id: _cell_conditions(row, about[row.sweep_id], spent) for row in rows}


@dataclass(frozen=True)
class _SweepFacts:
    """What holds for every cell that a sweep measured."""

    facts: Mapping[str, Any]
    environment: Mapping[str, str] | None
    limit: int | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)


def facts_of(
    config: Mapping[str, Any], manifest: Mapping[str, Any], end: Mapping[str, Any] | None
) -> _SweepFacts:
    """The facts that a sweep's manifests and its configuration hold; pure."""
    versions = manifest.get("versions") or {}
    gpu = manifest.get("gpu") or {}
    gpu_end = (end or {}).get("gpu") or {}
    work = manifest.get("workload") or {}
    clocks = [clock for clock in (gpu.get("sm_clock_mhz"), gpu_end.get("sm_clock_mhz")) if clock]
    on_cpu = str(manifest.get("device", "")) == "cpu"
    facts = {
        "measuring": manifest.get("measuring_version"),
        "harness": versions.get("transformer-harness"),
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
        "triton": None if on_cpu else versions.get("triton"),
        "lm_eval": versions.get("lm-eval"),
        "tokenizers": versions.get("tokenizers"),
        "cuda": None if on_cpu else manifest.get("cuda"),
        "cudnn": manifest.get("cudnn"),
        "driver": gpu.get("driver"),
        "cpu": manifest.get("cpu"),
        "threads": work.get("threads") if on_cpu else None,
        "jobs": work.get("jobs"),
        "power_cap_w": _rounded(gpu.get("power_cap_w")),
        "sm_clock_max_mhz": gpu.get("sm_clock_max_mhz"),
        "memory_clock_max_mhz": gpu.get("memory_clock_max_mhz"),
        "sm_clock_set_mhz": gpu.get("sm_clock_set_mhz"),
        "memory_clock_set_mhz": gpu.get("memory_clock_set_mhz"),
        # An idle device clocks down, so of the two looks the faster one says what it runs at.
        "sm_clock_seen_mhz": max(clocks, default=None),
        "ecc": gpu.get("ecc"),
        "throttled": _throttling(manifest, end) if gpu else None,
    }
    return _SweepFacts(
        facts=facts,
        environment=manifest.get("environment"),
        limit=config.get("limit"),
        tasks=work.get("tasks") or {},
        budget=work.get("budget") or {},
    )


def _cell_conditions(row: Any, sweep: _SweepFacts, spent: set[tuple[int, str]]) -> Conditions:
    is_task = row.kind == CellKind.TASK
    made = "transform_" if row.kind == CellKind.TRANSFORM else ""
    used = {
        "calibration": (row.variant_id, "calibration_tokens") in spent,
        "training": (row.variant_id, "trained_tokens") in spent,
    }
    facts = {
        **sweep.facts,
        # What lm-eval's files do not say of an imported row is empty, or unknown.
        "device": row.device_name or None,
        "dtype": None if row.dtype == "unknown" else row.dtype,
        "model": row.model_identity or None,
        "limit": sweep.limit if is_task else None,
        "task": sweep.tasks.get(row.task) if is_task else None,
        **{f"{made}{name}": _budget(sweep.budget.get(name)) if used[name] else None for name in used},
    }
    return Conditions(
        cell=row.id,
        sweep=row.sweep_id,
        facts=facts,
        environment=sweep.environment,
        simulated=row.simulated is True,
        synthetic=row.synthetic,
    )


def _budget(spent: Mapping[str, Any] | None) -> str | None:
    if spent is None:
        return None
    shown = {name: value[:8] if name == "text" else value for name, value in spent.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _throttling(manifest: Mapping[str, Any], end: Mapping[str, Any] | None) -> str:
    """``none``, or what slowed the device down: seen at the start or the end, or counted between them."""
    start_gpu, end_gpu = manifest.get("gpu") or {}, (end or {}).get("gpu") or {}
    seen = {
        reason
        for gpu in (start_gpu, end_gpu)
        for reason in gpu.get("throttle_reasons") or ()
        if reason in _SLOWDOWNS
    }
    elapsed_s = _elapsed_s(manifest.get("time_utc"), (end or {}).get("time_utc"))
    before, after = start_gpu.get("violation_s") or {}, end_gpu.get("violation_s") or {}
    for name in _VIOLATIONS:
        if elapsed_s and before.get(name) is not None and after.get(name) is not None:
            share = (after[name] - before[name]) / elapsed_s
            if share > _VIOLATION_SHARE:
                seen.add(f"{name} violations")
    return ", ".join(sorted(seen)) or "none"


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _elapsed_s(start: str | None, end: str | None) -> float | None:
    """Seconds between two times of manifests; None where one is missing or, in a foreign file, no time."""
    if start is None or end is None:
        return None
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (TypeError, ValueError):
        return None
