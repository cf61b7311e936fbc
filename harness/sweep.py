"""A sweep: the plan's cells that are not measured yet, run by an executor, streamed into the store.

The parent is the store's only writer. Each cell is on disk before the worker's next one is taken, so a
sweep that dies loses at most the cells in flight, and the same command again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from harness.conditions import workload
from harness.derive import Derivation
from harness.errors import StoreError
from harness.executors.local import LocalExecutor
from harness.grid import CellPlan, VariantPlan
from harness.interrupts import Interrupts
from harness.job import Message, Phase, Progress, VariantJob
from harness.measure.ceilings import Ceilings, ceilings_of_sweep
from harness.measure.machine import manifest
from harness.models.loading import fetch
from harness.planning import SweepPlan, threads_per_worker, variant_job
from harness.records import CellResult, Status, VariantReport
from harness.store.liveness import this_process
from harness.store.store import FinishedCell, Store, VariantRow
from harness.verdicts import Verdicts

__all__ = ["Reporter", "SweepOutcome", "cells_to_run", "run_sweep"]

log = logging.getLogger("harness.sweep")


class Reporter(Protocol):
    """What shows a sweep to the user."""

    def started(self, plan: SweepPlan, reused: int) -> None: ...
    def phase(self, variant: VariantPlan, cell: CellPlan | None) -> None: ...
    def progress(self, variant: VariantPlan, progress: Progress) -> None: ...
    def finished(self, variant: VariantPlan, cell: CellPlan, result: CellResult) -> None: ...


@dataclass
class SweepOutcome:
    """What came of a sweep: the number of cells by status, and how many were already measured."""

    sweep_id: int
    statuses: Counter[Status] = field(default_factory=Counter)
    reused: int = 0

    @property
    def failures(self) -> int:
        return sum(count for status, count in self.statuses.items() if status.is_failure)

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0


def cells_to_run(
    plan: SweepPlan, finished: Mapping[str, FinishedCell]
) -> tuple[frozenset[str], dict[str, FinishedCell]]:
    """Which cells to measure, and which finished ones stand: pure.

    By default everything that has a result stands, whatever its status; `--retry-failed` measures
    failures again and `--fresh` everything.
    """
    reused = {}
    for cell in plan.grid.cells:
        done = finished.get(cell.key)
        if done is None or plan.config.fresh:
            continue
        if done.status is Status.SKIPPED or (done.status.is_failure and plan.config.retry_failed):
            continue
        reused[cell.key] = done
    return frozenset(cell.key for cell in plan.grid.cells if cell.key not in reused), reused


def run_sweep(
    plan: SweepPlan, store: Store, reporter: Reporter, command: str, interrupts: Interrupts
) -> SweepOutcome:
    """Run what is not measured yet and store it.

    Raises:
        ConfigError: a model of the hub cannot be downloaded; nothing was begun.
        Interrupted: a signal came; the workers are gone and what was finished is stored.
        DiskFull: a worker could not write to the cache; what was finished before is stored.
        StoreError: the store cannot be written; what was finished before is stored.
    """
    finished = store.finished_cells(cell.key for cell in plan.grid.cells)
    to_run, reused = cells_to_run(plan, finished)
    _fetch_models(plan, to_run)
    ceilings = _ceilings(plan, to_run)
    sweep_id = store.open_sweep(
        command=command,
        config=plan.config.model_dump(mode="json"),
        manifest={
            **manifest(plan.device),
            "workload": workload(plan),
            "process": this_process(),
            "sweep_uid": uuid.uuid4().hex,  # known by it in whatever store its rows are copied to
            "ceilings": ceilings,
        },
        cells_planned=len(plan.grid.cells),
    )
    try:
        outcome = _run(plan, store, reporter, sweep_id, to_run, reused, interrupts, ceilings)
    except BaseException:
        # Where the store is the trouble, its first words count; that this process is gone will tell.
        with contextlib.suppress(StoreError):
            store.close_sweep(sweep_id, "interrupted", manifest(plan.device))
        raise
    store.close_sweep(sweep_id, "finished", manifest(plan.device))
    return outcome


def _fetch_models(plan: SweepPlan, to_run: frozenset[str]) -> None:
    """Download here, once and in sight, what workers would otherwise each wait for and fail by."""
    wanted = {
        variant.model.identity: variant.model
        for variant in plan.grid.variants
        if any(cell.key in to_run and cell.decision is None for cell in variant.cells)
    }
    for model in wanted.values():
        fetch(model)


def _run(
    plan: SweepPlan,
    store: Store,
    reporter: Reporter,
    sweep_id: int,
    to_run: frozenset[str],
    reused: Mapping[str, FinishedCell],
    interrupts: Interrupts,
    ceilings: dict[str, Any] | None,
) -> SweepOutcome:
    outcome = SweepOutcome(sweep_id, reused=len(reused))
    outcome.statuses.update(cell.status for cell in reused.values())
    store.link_cells(sweep_id, [cell.id for cell in reused.values()])
    derivation = Derivation(store, plan.grid)
    verdicts = Verdicts(store, plan.grid, Ceilings.from_json(ceilings))
    for key, done in reused.items():
        derivation.stored(key, done.id, done.status)
        verdicts.stored(key, done.id, done.status)
    variants = {variant.key: variant for variant in plan.grid.variants}
    cells = {cell.key: cell for cell in plan.grid.cells}
    reporter.started(plan, len(reused))
    for variant in plan.grid.variants:
        store.write_variant(sweep_id, _variant_row(plan, variant))

    def write(variant: VariantPlan, result: CellResult) -> None:
        cell = cells[result.key]
        cell_id = store.write_cell(
            sweep_id,
            result,
            kind=cell.kind,
            task=cell.task.name if cell.task else None,
            scenario=cell.scenario.label if cell.scenario else None,
        )
        outcome.statuses[result.status] += 1
        derivation.stored(result.key, cell_id, result.status)
        verdicts.stored(result.key, cell_id, result.status)
        reporter.finished(variant, cell, result)

    def on_message(job: VariantJob, message: Message) -> None:
        variant = variants[job.variant_key]
        if isinstance(message, CellResult):
            write(variant, message)
        elif isinstance(message, VariantReport):
            store.write_effects(variant.key, message)
        elif isinstance(message, Phase):
            reporter.phase(variant, cells.get(message.name))
        elif isinstance(message, Progress):
            reporter.progress(variant, message)

    jobs = []
    for variant in plan.grid.variants:
        keys = set()
        for cell in variant.cells:
            if cell.key not in to_run:
                continue
            if cell.decision is None:
                keys.add(cell.key)
            else:
                decided = CellResult(cell.key, variant.key, cell.decision.status, cell.decision.reason)
                write(variant, decided)
        if keys:
            jobs.append(replace(variant_job(plan, variant, frozenset(keys)), ceilings=ceilings))
    limit_gib = plan.config.memory_limit_gib
    executor = LocalExecutor(
        max(1, min(plan.config.jobs, len(jobs))),  # they share the memory, and none is for who never comes
        plan.config.timeout_s,
        _devices(plan),
        memory_limit_bytes=None if limit_gib is None else math.ceil(limit_gib * 2**30),
        interrupts=interrupts,
    )
    executor.run(jobs, on_message)
    return outcome


def _variant_row(plan: SweepPlan, variant: VariantPlan) -> VariantRow:
    info = variant.model.info
    return VariantRow(
        key=variant.key,
        model=info.label,
        model_identity=variant.model.identity,
        method=variant.chain.label,
        chain=variant.chain.described(),
        family=variant.chain.family,
        seed=variant.seed,
        dtype=plan.dtype,
        device=plan.device,
        device_name=plan.device_name,
        synthetic=info.synthetic,
        model_info=asdict(info),
        simulated=None,
    )


def _ceilings(plan: SweepPlan, to_run: frozenset[str]) -> dict[str, Any] | None:
    """What the device can do, where this sweep times anything; None where it does not."""
    times = any(
        cell.scenario is not None and cell.decision is None and cell.key in to_run for cell in plan.grid.cells
    )
    return ceilings_of_sweep(plan.device, threads_per_worker(plan.config.jobs)) if times else None


def _devices(plan: SweepPlan) -> tuple[str, ...]:
    """One GPU for each worker where there are several workers."""
    if plan.config.jobs == 1 or plan.device != "cuda":
        return ()
    import torch

    count = torch.cuda.device_count()
    return tuple(f"cuda:{slot % count}" for slot in range(plan.config.jobs))
