"""How long cells took, for estimates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import func, select

from harness.records import Status
from harness.store.store import Store
from harness.store.tables import cells, imports, variants

__all__ = ["Duration", "durations"]


@dataclass(frozen=True, slots=True)
class Duration:
    """The wall-clock seconds of one measured cell, by model and by what was measured."""

    model: str
    cell: str  # the task's name, the scenario's label, or "transform"
    seconds: float


def durations(store: Store) -> Iterator[Duration]:
    """Every cell that was measured here, oldest first."""
    label = func.coalesce(cells.c.task, cells.c.scenario, "transform")
    query = (
        select(variants.c.model, label, cells.c.seconds)
        .join(variants, cells.c.variant_id == variants.c.id)
        .where(cells.c.status == str(Status.OK))
        .where(cells.c.sweep_id.not_in(select(imports.c.sweep_id)))
        .order_by(cells.c.id)
    )
    with store.reading() as connection:
        for model, cell, seconds in connection.execute(query):
            yield Duration(model, cell, seconds)
