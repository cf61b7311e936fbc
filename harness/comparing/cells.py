"""The stored cells that are compared, with their records, readings and conditions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import select

from harness.comparability import Conditions
from harness.comparing.ratios import Reading
from harness.conditions import read_conditions
from harness.records import Item, Status
from harness.store import queries
from harness.store.chunks import chunks
from harness.store.exchange_rows import original_key
from harness.store.readings import all_readings
from harness.store.store import Store
from harness.store.tables import cells, sweeps

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Cell", "all_cells", "cells_in", "cells_of"]

_PLACE = ("model", "seed", "kind", "task", "scenario", "origin")  # what was imported stands apart


class Cell:
    """A stored cell of any status with its finite records and readings by metric.

    `broken` are metrics that were recorded and are no number; `measurement` is equal only for the very
    same measurement, in whatever store its rows are.
    """

    def __init__(self, store: Store, rows: Sequence[Mapping[str, Any]], measurement: tuple[Any, ...]) -> None:
        row = rows[0]
        self.store, self.measurement = store, measurement
        self.id, self.variant = int(row["cell"]), int(row["variant"])
        self.method, self.options = str(row["method"]), row["options"]
        self.sweep, self.dtype, self.device = int(row["sweep"]), row["dtype"], row["device_name"]
        self.is_baseline, self.origin = row["family"] == "baseline", row["origin"]
        self.status, self.reason = Status(row["status"]), row["reason"]
        self.place: tuple[Any, ...] = tuple(row[name] for name in _PLACE)
        self.records: dict[str, Reading] = {}
        self.units: dict[str, str] = {}
        self.broken: set[str] = set()
        self.conditions: Conditions = Conditions(self.id, self.sweep, {})

    @property
    def is_ok(self) -> bool:
        return self.status is Status.OK

    @property
    def told(self) -> str:
        """How it ended, with the reason where there is one."""
        return str(self.status) if self.reason is None else f"{self.status}: {self.reason}"

    @property
    def model(self) -> str:
        return str(self.place[0])

    @property
    def seed(self) -> int:
        return int(self.place[1])

    @property
    def kind(self) -> str:
        return str(self.place[2])

    @property
    def label(self) -> str:
        return str(self.place[3] or self.place[4])

    @property
    def setting(self) -> tuple[Any, ...]:
        """What its baseline was measured in too: rounds against that baseline say nothing of another one."""
        return (*self.place[:2], self.place[-1], self.dtype, self.device)

    def items(self) -> list[Item]:
        """The outcomes of its items."""
        return self.store.items(self.id)


def cells_of(store: Store, models: Sequence[str] | None = None) -> list[Cell]:
    """The current cells that are ok."""
    return [cell for cell in all_cells(store, models) if cell.is_ok]


def all_cells(
    store: Store, models: Sequence[str] | None = None, sweep: int | Literal["last"] | None = None
) -> list[Cell]:
    """The current cells, or all cells of a sweep, in the order in which they were stored.

    Raises:
        UnknownName: no such sweep.
        StoreError: the store cannot be read.
    """
    return cells_in(store, queries.results(store, models=models, sweep=sweep))


def cells_in(store: Store, frame: pd.DataFrame) -> list[Cell]:
    """The cells of rows that have the columns `Cell` reads, as `harness.store.queries.results` gives them."""
    frame = frame.astype(object).where(frame.notna(), None)
    ids = {int(cell) for cell in frame["cell"]}
    ok = {int(cell) for cell in frame["cell"][frame["status"] == str(Status.OK)]}
    readings = all_readings(store, ok)
    conditions = read_conditions(store, ok)
    measurements = _measurements(store, ids)
    found = []
    for _, group in frame.groupby("cell", sort=True):
        rows = [{str(key): value for key, value in row.items()} for row in group.to_dict("records")]
        cell = Cell(store, rows, measurements[int(rows[0]["cell"])])
        if cell.is_ok:
            cell.conditions = conditions[cell.id]
            _fill(cell, rows, readings)
        found.append(cell)
    return found


def _fill(
    cell: Cell, rows: Sequence[Mapping[str, Any]], readings: Mapping[tuple[int, str], tuple[float, ...]]
) -> None:
    for row in rows:
        metric, value = row["metric"], row["value"]
        if metric is None:
            continue
        cell.units[metric] = row["unit"] or ""
        if value is None or not math.isfinite(value):
            cell.broken.add(metric)
            continue
        samples = readings.get((cell.id, metric), ())
        cell.records[metric] = Reading(value, samples, row["lower"], row["upper"], row["mode"])


def _measurements(store: Store, ids: Iterable[int]) -> dict[int, tuple[Any, ...]]:
    wanted = sorted(ids)
    query = select(cells.c.id, cells.c.key, cells.c.started_at, cells.c.sweep_id)
    found: dict[int, tuple[Any, ...]] = {}
    with store.reading() as connection:
        rows = [
            row for chunk in chunks(wanted) for row in connection.execute(query.where(cells.c.id.in_(chunk)))
        ]
        asked = select(sweeps.c.id, sweeps.c.manifest, sweeps.c.started_at)
        asked = asked.where(sweeps.c.id.in_(sorted({row.sweep_id for row in rows})))
        uids = {
            id_: (manifest or {}).get("sweep_uid") or at for id_, manifest, at in connection.execute(asked)
        }
    for row in rows:
        found[row.id] = (uids[row.sweep_id], original_key(row.key), row.started_at)
    return found
