"""The cells that are not ok."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from sqlalchemy import case, func, select

from harness.records import Status
from harness.store.frames import frame_of, typed
from harness.store.store import Store
from harness.store.tables import cells, variants

from .scope import Filters, chosen_cells, passing

__all__ = ["Failures", "failures", "what_was_said"]

_NOT_OK = [str(status) for status in Status if status is not Status.OK]


class Failures(NamedTuple):
    """How many cells ended how, and the rows of one page."""

    counts: dict[str, int]
    rows: pd.DataFrame


def failures(
    store: Store, filters: Filters, sweep: int | None, *, first: int = 0, count: int = 100
) -> Failures:
    """The cells that are not ok: first those that should have been, then the newest first.

    The rows have the columns cell, variant, status, model, method, ``place``, reason, seconds, sweep and
    started_at.
    """
    wanted = [status for status in _NOT_OK if not filters.statuses or status in filters.statuses]
    conditions = [cells.c.status.in_(wanted), chosen_cells(sweep), *passing(store, filters, sweep)]
    if filters.tasks:
        conditions.append(cells.c.task.is_(None) | cells.c.task.in_(filters.tasks))
    source = cells.join(variants, variants.c.id == cells.c.variant_id)
    counts = select(cells.c.status, func.count()).select_from(source).where(*conditions)
    failed = [str(status) for status in Status if status.is_failure]
    rows = (
        select(
            cells.c.id.label("cell"),
            variants.c.id.label("variant"),
            cells.c.status,
            variants.c.model,
            variants.c.method,
            func.coalesce(cells.c.task, cells.c.scenario, cells.c.kind).label("place"),
            cells.c.reason,
            cells.c.seconds,
            cells.c.sweep_id.label("sweep"),
            cells.c.started_at,
        )
        .select_from(source)
        .where(*conditions)
        .order_by(case((cells.c.status.in_(failed), 0), else_=1), cells.c.id.desc())
        .limit(count)
        .offset(first)
    )
    with store.reading() as connection:
        counted = dict(connection.execute(counts.group_by(cells.c.status)).all())
        frame = frame_of(connection, rows)
    frame["started_at"] = frame["started_at"].str.slice(0, 19).str.replace("T", " ").astype(object)
    frame = typed(frame, floats=("seconds",), integers=("cell", "variant", "sweep"))
    return Failures(dict(sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))), frame)


def what_was_said(store: Store, cell: int) -> Any:
    """The reason, the traceback and the end of the worker's log of one cell."""
    query = select(cells.c.reason, cells.c.traceback, cells.c.log_tail).where(cells.c.id == cell)
    with store.reading() as connection:
        return connection.execute(query).one()
