"""What is in a store, as tidy pandas DataFrames: selected, joined and filtered in SQL.

The *current* cells are the newest of each key. In every frame the column `sweep` is the sweep that
measured the row, which for a reused cell is an earlier one than the sweep asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pandas as pd
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    and_,
    case,
    func,
    or_,
    select,
)

from harness.errors import UnknownName
from harness.records import CellKind, Status
from harness.store.failures import translated
from harness.store.store import Store
from harness.store.tables import (
    cells,
    machines,
    records,
    sweep_cells,
)
from harness.store.tables import (
    effects as effects_table,
)
from harness.store.tables import (
    items as items_table,
)
from harness.store.tables import (
    samples as samples_table,
)
from harness.store.tables import (
    sweeps as sweeps_table,
)
from harness.store.tables import (
    variants as variants_table,
)

__all__ = [
    "RESULT_COLUMNS",
    "effects",
    "failures",
    "items",
    "paired_items",
    "results",
    "samples",
    "sweeps",
    "variants",
]

RESULT_COLUMNS = (
    "sweep", "model", "method", "options", "seed", "dtype", "device", "status", "reason", "task",
    "scenario", "metric", "value", "unit", "lower", "upper", "n", "synthetic", "mode", "note",
    "kind", "family", "cell", "variant", "device_name", "simulated",
)  # fmt: skip

_TRANSFORM_LABEL = "transform"
_CHUNK = 10_000


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
    the list of them; `task` is None for scenario and transform cells; `scenario` is the label, or
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
    scenario = func.coalesce(
        cells.c.scenario,
        # A transform cell has no scenario of its own; its rows are found under this name.
        case((cells.c.kind == str(CellKind.TRANSFORM), _TRANSFORM_LABEL), else_=None),
    )
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
            scenario.label("scenario"),
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
        )
        .select_from(
            cells.join(variants_table, cells.c.variant_id == variants_table.c.id).outerjoin(
                records, records.c.cell_id == cells.c.id
            )
        )
        .order_by(
            cells.c.sweep_id,
            variants_table.c.model,
            variants_table.c.method,
            cells.c.id,
            records.c.id,
        )
    )
    for column, wanted in (
        (variants_table.c.model, models),
        (cells.c.task, tasks),
        (scenario, scenarios),
        (records.c.metric, metrics),
        (cells.c.status, statuses),
    ):
        if wanted is not None:
            query = query.where(column.in_([str(name) for name in wanted]))
    if methods is not None:
        query = query.where(_is_method(methods))
    with _reading(store) as connection:
        query = query.where(_current(connection, sweep))
        frame = _frame(connection, query)
    frame["options"] = frame["options"].map(_options_of)
    return _typed(
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
    with _reading(store) as connection:
        frame = _frame(connection, query.where(_current(connection, sweep)))
    return _typed(frame, floats=("seconds",), integers=("sweep", "cell", "variant"))


def sweeps(store: Store | Engine) -> pd.DataFrame:
    """One row a sweep, with how many cells it has, is ok in and failed in, and its machine."""
    counted = (
        select(
            sweep_cells.c.sweep_id,
            func.count().label("cells"),
            _count_where(cells.c.status == str(Status.OK)).label("cells_ok"),
            _count_where(cells.c.status.in_([str(status) for status in Status if status.is_failure])).label(
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
        )
        .join(machines, machines.c.id == sweeps_table.c.machine_id)
        .outerjoin(counted, counted.c.sweep_id == sweeps_table.c.id)
        .order_by(sweeps_table.c.id)
    )
    with _reading(store) as connection:
        frame = _frame(connection, query)
    counts = ("sweep", "cells_planned", "cells", "cells_ok", "cells_failed", "machine")
    return _typed(frame, integers=counts)


def variants(store: Store | Engine) -> pd.DataFrame:
    """One row a variant, with the bytes of its modules before and after the transform."""
    sizes = (
        select(
            effects_table.c.variant_id,
            func.count().label("modules"),
            _count_where(effects_table.c.changed).label("modules_changed"),
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
    with _reading(store) as connection:
        frame = _frame(connection, query)
    return _typed(
        frame,
        integers=("variant", "sweep", "seed"),
        optional_integers=tuple(column.name for column in sums),
        booleans=("synthetic",),
    )


def effects(store: Store | Engine, variant: int) -> pd.DataFrame:
    """What the transform of a variant did to each module, in the order of the model."""
    hidden = ("variant_id", "position")
    columns = [column for column in effects_table.c if column.name not in hidden]
    query = select(*columns).where(effects_table.c.variant_id == variant).order_by(effects_table.c.position)
    with _reading(store) as connection:
        frame = _frame(connection, query)
    return _typed(
        frame,
        floats=("stored_bits_per_weight", "sparsity"),
        integers=("parameters", "bytes_before", "bytes_after"),
        booleans=("changed", "simulated"),
    )


def samples(store: Store | Engine, record_ids: Iterable[int]) -> pd.DataFrame:
    """The raw readings of records: columns record, position, value."""
    table = samples_table
    query = select(table.c.record_id.label("record"), table.c.position, table.c.value)
    order = (table.c.record_id, table.c.position)
    frame = _chunked(store, query.order_by(*order), table.c.record_id, record_ids)
    return _typed(frame, floats=("value",), integers=("record", "position"))


def items(store: Store | Engine, cell_ids: Iterable[int]) -> pd.DataFrame:
    """The outcomes of the items of cells: columns cell, index, metric, outcome, detail."""
    table = items_table
    query = select(
        table.c.cell_id.label("cell"),
        table.c.position.label("index"),
        table.c.metric,
        table.c.outcome,
        table.c.detail,
    ).order_by(table.c.cell_id, table.c.metric, table.c.position)
    frame = _chunked(store, query, table.c.cell_id, cell_ids)
    return _typed(frame, floats=("outcome",), integers=("cell", "index"))


def paired_items(store: Store | Engine, cell_a: int, cell_b: int, metric: str) -> pd.DataFrame:
    """The outcomes of the items that two cells have in common: columns index, a, b."""
    a, b = items_table.alias("a"), items_table.alias("b")
    both = and_(b.c.position == a.c.position, b.c.metric == a.c.metric, b.c.cell_id == cell_b)
    query = (
        select(a.c.position.label("index"), a.c.outcome.label("a"), b.c.outcome.label("b"))
        .select_from(a.join(b, both))
        .where(a.c.cell_id == cell_a, a.c.metric == metric)
        .order_by(a.c.position)
    )
    with _reading(store) as connection:
        frame = _frame(connection, query)
    return _typed(frame, floats=("a", "b"), integers=("index",))


# --- conditions -------------------------------------------------------------------------------


def _current(connection: Connection, sweep: int | Literal["last"] | None) -> ColumnElement[bool]:
    if sweep is None:
        return cells.c.id.in_(select(func.max(cells.c.id)).group_by(cells.c.key))
    ids = list(connection.scalars(select(sweeps_table.c.id)))
    if sweep == "last":
        sweep = max(ids, default=0)
    elif sweep not in ids:
        raise UnknownName("sweep", str(sweep), map(str, ids))
    return cells.c.id.in_(select(sweep_cells.c.cell_id).where(sweep_cells.c.sweep_id == sweep))


def _is_method(labels: Iterable[str]) -> ColumnElement[bool]:
    label = variants_table.c.method
    either: list[ColumnElement[bool]] = []
    for wanted in labels:
        either.append(label == wanted)
        if not set(wanted) & set(":+"):
            with_options = label.startswith(f"{wanted}:", autoescape=True)
            either.append(and_(with_options, label.not_like("%+%")))
    return or_(False, *either)


def _count_where(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


# --- frames -----------------------------------------------------------------------------------


@contextmanager
def _reading(store: Store | Engine) -> Iterator[Connection]:
    engine, label = (store.engine, store.label) if isinstance(store, Store) else (store, str(store.url))
    with translated(label), engine.connect() as connection:
        yield connection


def _frame(connection: Connection, query: Select[Any]) -> pd.DataFrame:
    found = connection.execute(query)
    rows = found.all()
    # Everything is an object first, so that a missing text is None and not a NaN.
    return pd.DataFrame(
        {
            name: pd.Series([row[place] for row in rows], dtype=object)
            for place, name in enumerate(found.keys())
        }
    )


def _chunked(
    store: Store | Engine, query: Select[Any], column: ColumnElement[Any], ids: Iterable[int]
) -> pd.DataFrame:
    wanted = sorted({int(id_) for id_ in ids})
    starts = range(0, max(len(wanted), 1), _CHUNK)
    with _reading(store) as connection:
        frames = [
            _frame(connection, query.where(column.in_(wanted[start : start + _CHUNK]))) for start in starts
        ]
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def _typed(
    frame: pd.DataFrame,
    *,
    floats: Sequence[str] = (),
    integers: Sequence[str] = (),
    optional_integers: Sequence[str] = (),
    booleans: Sequence[str] = (),
) -> pd.DataFrame:
    types = {
        **dict.fromkeys(floats, "float64"),
        **dict.fromkeys(integers, "int64"),
        **dict.fromkeys(optional_integers, "Int64"),
        **dict.fromkeys(booleans, "bool"),
    }
    return frame.astype(types)


def _options_of(chain: Sequence[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
    options = [dict(step["options"]) for step in chain]
    return options[0] if len(options) == 1 else options
