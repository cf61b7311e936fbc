"""What is in a store, as tidy pandas DataFrames: selected, joined and filtered in SQL.

The *current* cells are the newest of each key. In every frame the column `sweep` is the sweep that
measured the row, which for a reused cell is an earlier one than the sweep asked for. Rows that were
imported (`origin`) have keys of their own, so they stand beside those measured here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pandas as pd
from sqlalchemy import Engine, func, select

from harness.records import Status
from harness.store.details import effects, items, kernels, paired_items, samples
from harness.store.frames import count_where, frame_of, reading, typed
from harness.store.liveness import has_ended
from harness.store.selection import current, narrowed, scenario_label
from harness.store.store import Store
from harness.store.tables import cells, imports, machines, records, sweep_cells
from harness.store.tables import effects as effects_table
from harness.store.tables import sweeps as sweeps_table
from harness.store.tables import variants as variants_table

__all__ = [
    "RESULT_COLUMNS",
    "effects",
    "failures",
    "items",
    "kernels",
    "paired_items",
    "results",
    "samples",
    "sweeps",
    "variants",
]

RESULT_COLUMNS = (
    "sweep", "model", "method", "options", "seed", "dtype", "device", "status", "reason", "task",
    "scenario", "metric", "value", "unit", "lower", "upper", "n", "synthetic", "mode", "note",
    "kind", "family", "cell", "variant", "device_name", "simulated", "origin",
)  # fmt: skip


def results(
    store: Store | Engine,
    *,
    sweep: int | Literal["last"] | None = None,
    models: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    scenarios: Iterable[str] | None = None,
    metrics: Iterable[str] | None = None,
    statuses: Iterable[str] | None = None,
) -> pd.DataFrame:
    """One row per record of the current cells, and one per cell without records.

    Columns are `RESULT_COLUMNS`: `options` is the dict of all options of a method, for a chain
    the list of them; `origin` is the file that an imported row came from, None for what was measured
    here; `task` is None for scenario and transform cells; `scenario` is the label, or
    ``transform``; `metric` is None for a cell without records. Ordered by sweep, model, method,
    cell and record.

    Args:
        sweep: a sweep's id or ``"last"``: all cells of that sweep, reused ones included.
        methods: labels; a name without options also means every setting of it (``gptq`` finds
            ``gptq:bits=3``).
        metrics: leaves out everything else, cells without records too.
        models, tasks, scenarios, statuses: exact labels. None means all.

    Raises:
        UnknownName: no such sweep.
        StoreError: the store cannot be read.
    """
    query = (
        select(
            cells.c.sweep_id.label("sweep"),
            variants_table.c.model,
            variants_table.c.method,
            variants_table.c.chain.label("options"),
            variants_table.c.seed,
            variants_table.c.dtype,
            variants_table.c.device,
            cells.c.status,
            cells.c.reason,
            cells.c.task,
            scenario_label.label("scenario"),
            records.c.metric,
            records.c.value,
            records.c.unit,
            records.c.lower,
            records.c.upper,
            records.c.n,
            variants_table.c.synthetic,
            records.c.mode,
            records.c.note,
            cells.c.kind,
            variants_table.c.family,
            cells.c.id.label("cell"),
            variants_table.c.id.label("variant"),
            variants_table.c.device_name,
            variants_table.c.simulated,
            imports.c.origin,
        )
        .select_from(
            cells.join(variants_table, cells.c.variant_id == variants_table.c.id)
            .outerjoin(records, records.c.cell_id == cells.c.id)
            .outerjoin(imports, imports.c.sweep_id == cells.c.sweep_id)
        )
        .order_by(
            cells.c.sweep_id,
            variants_table.c.model,
            variants_table.c.method,
            cells.c.id,
            records.c.id,
        )
    )
    query = narrowed(
        query,
        models=models,
        methods=methods,
        tasks=tasks,
        scenarios=scenarios,
        metrics=metrics,
        statuses=statuses,
    )
    with reading(store) as connection:
        query = query.where(current(connection, sweep))
        frame = frame_of(connection, query)
    frame["options"] = frame["options"].map(_options_of)
    return typed(
        frame[list(RESULT_COLUMNS)],
        floats=("value", "lower", "upper"),
        integers=("sweep", "seed", "cell", "variant"),
        optional_integers=("n",),
        booleans=("synthetic",),
    )


def failures(store: Store | Engine, *, sweep: int | Literal["last"] | None = None) -> pd.DataFrame:
    """The cells that are not ok, with reason, traceback and the end of the worker's log.

    Args:
        sweep: a sweep's id or ``"last"``; None means the current cells.
    """
    query = (
        select(
            cells.c.sweep_id.label("sweep"),
            variants_table.c.model,
            variants_table.c.method,
            cells.c.kind,
            cells.c.task,
            cells.c.scenario,
            cells.c.status,
            cells.c.reason,
            cells.c.traceback,
            cells.c.log_tail,
            cells.c.started_at,
            cells.c.seconds,
            cells.c.id.label("cell"),
            variants_table.c.id.label("variant"),
        )
        .join(variants_table, cells.c.variant_id == variants_table.c.id)
        .where(cells.c.status != str(Status.OK))
        .order_by(cells.c.sweep_id, variants_table.c.model, variants_table.c.method, cells.c.id)
    )
    with reading(store) as connection:
        frame = frame_of(connection, query.where(current(connection, sweep)))
    return typed(frame, floats=("seconds",), integers=("sweep", "cell", "variant"))


def sweeps(store: Store | Engine) -> pd.DataFrame:
    """One row a sweep, with how many cells it has, is ok in and failed in, and its machine.

    A sweep that was killed could not say so: it is ``interrupted`` where its process is known to be gone.
    """
    counted = (
        select(
            sweep_cells.c.sweep_id,
            func.count().label("cells"),
            count_where(cells.c.status == str(Status.OK)).label("cells_ok"),
            count_where(cells.c.status.in_([str(status) for status in Status if status.is_failure])).label(
                "cells_failed"
            ),
        )
        .join(cells, cells.c.id == sweep_cells.c.cell_id)
        .group_by(sweep_cells.c.sweep_id)
        .subquery()
    )
    query = (
        select(
            sweeps_table.c.id.label("sweep"),
            sweeps_table.c.status,
            sweeps_table.c.started_at,
            sweeps_table.c.finished_at,
            sweeps_table.c.cells_planned,
            func.coalesce(counted.c.cells, 0).label("cells"),
            func.coalesce(counted.c.cells_ok, 0).label("cells_ok"),
            func.coalesce(counted.c.cells_failed, 0).label("cells_failed"),
            sweeps_table.c.command,
            sweeps_table.c.config,
            sweeps_table.c.manifest,
            sweeps_table.c.manifest_end,
            machines.c.id.label("machine"),
            machines.c.facts.label("machine_facts"),
            imports.c.origin,
        )
        .join(machines, machines.c.id == sweeps_table.c.machine_id)
        .outerjoin(counted, counted.c.sweep_id == sweeps_table.c.id)
        .outerjoin(imports, imports.c.sweep_id == sweeps_table.c.id)
        .order_by(sweeps_table.c.id)
    )
    with reading(store) as connection:
        frame = frame_of(connection, query)
    killed = [
        status == "running" and has_ended(manifest.get("process"))
        for status, manifest in zip(frame["status"], frame["manifest"], strict=True)
    ]
    frame.loc[killed, "status"] = "interrupted"
    counts = ("sweep", "cells_planned", "cells", "cells_ok", "cells_failed", "machine")
    return typed(frame, integers=counts)


def variants(store: Store | Engine) -> pd.DataFrame:
    """One row a variant, with the bytes of its modules before and after the transform."""
    sizes = (
        select(
            effects_table.c.variant_id,
            func.count().label("modules"),
            count_where(effects_table.c.changed).label("modules_changed"),
            func.sum(effects_table.c.bytes_before).label("bytes_before"),
            func.sum(effects_table.c.bytes_after).label("bytes_after"),
        )
        .group_by(effects_table.c.variant_id)
        .subquery()
    )
    names = [
        column.label("variant" if column.name == "id" else "sweep")
        if column.name in ("id", "sweep_id")
        else column
        for column in variants_table.c
    ]
    sums = [sizes.c.modules, sizes.c.modules_changed, sizes.c.bytes_before, sizes.c.bytes_after]
    query = (
        select(*names, *sums)
        .select_from(variants_table)
        .outerjoin(sizes, sizes.c.variant_id == variants_table.c.id)
        .order_by(variants_table.c.id)
    )
    with reading(store) as connection:
        frame = frame_of(connection, query)
    return typed(
        frame,
        integers=("variant", "sweep", "seed"),
        optional_integers=tuple(column.name for column in sums),
        booleans=("synthetic",),
    )


def _options_of(chain: Sequence[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
    options = [dict(step["options"]) for step in chain]
    return options[0] if len(options) == 1 else options
