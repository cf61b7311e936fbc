"""The raw readings behind the metrics of cells."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select

from harness.store.chunks import chunks
from harness.store.encoding import nan_if_null
from harness.store.store import Store
from harness.store.tables import records, samples

__all__ = ["all_readings", "readings"]


def readings(store: Store, cell: int, metric: str) -> list[float]:
    """The samples in the order in which they were taken; empty where none were kept."""
    query = (
        select(samples.c.value)
        .join(records, samples.c.record_id == records.c.id)
        .where(records.c.cell_id == cell, records.c.metric == metric)
        .order_by(samples.c.position)
    )
    with store.reading() as connection:
        return [float(value) for value in connection.scalars(query)]


def all_readings(store: Store, cells: Iterable[int]) -> dict[tuple[int, str], tuple[float, ...]]:
    """The samples of all metrics of many cells, by cell and metric, in the order of measuring."""
    wanted = sorted(set(cells))
    found: dict[tuple[int, str], list[float]] = {}
    query = (
        select(records.c.cell_id, records.c.metric, samples.c.value)
        .join(records, samples.c.record_id == records.c.id)
        .order_by(samples.c.record_id, samples.c.position)
    )
    with store.reading() as connection:
        for chunk in chunks(wanted):
            for cell, metric, value in connection.execute(query.where(records.c.cell_id.in_(chunk))):
                found.setdefault((cell, metric), []).append(nan_if_null(value))
    return {key: tuple(values) for key, values in found.items()}
