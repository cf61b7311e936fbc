"""The raw readings behind one metric of one cell."""

from __future__ import annotations

from sqlalchemy import select

from harness.store.store import Store
from harness.store.tables import records, samples

__all__ = ["readings"]


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
