"""What there is to show and compare: a column for each thing that was measured, by the store's catalogue."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, or_, select

from harness.display import LEADING, better, column_name, order_key
from harness.evaluate.definitions import Score, definitions
from harness.store.catalogue import Entry, measured_in
from harness.store.store import Store
from harness.store.tables import catalogue, cells, records

from .scope import chosen_cells

__all__ = ["Column", "about", "columns", "leading", "of_models"]

_LEADING_COSTS, _LEADING_SCORES = 4, 5


@dataclass(frozen=True, slots=True)
class Column:
    """One thing that can be compared: a metric at a place, with what tells scores of one name apart.

    `name` is what pages call it (``acc · hellaswag (limit 10)``); `kind` and `place` say which cells hold it,
    `meanings` which records of them (limit of items, windows), None where all do. `direction` is ``lower``,
    ``higher`` or None where nobody knows. `models` are those that it was measured of.
    """

    name: str
    metric: str
    place: str
    kind: str
    unit: str
    direction: str | None
    models: frozenset[str]
    meanings: tuple[tuple[int, str], ...] | None = None

    @property
    def aspect(self) -> str:
        """What it is about: quality, latency, throughput, memory, energy, cost to compress, or other."""
        if self.kind == "task":
            return "quality"
        if self.kind == "transform" and (self.metric.startswith("transform_") or self.unit == "tokens"):
            return "cost to compress"
        base, _, per = self.unit.partition("/")
        if per == "s":
            return "throughput"
        return {"s": "latency", "B": "memory", "J": "energy", "W": "energy"}.get(base, "other")

    def of_cells(self) -> ColumnElement[bool]:
        """The condition on `cells`; every column of the index is named, so that the database uses it."""
        task = self.place if self.kind == "task" else None
        scenario = self.place if self.kind == "scenario" else None
        return and_(cells.c.kind == self.kind, cells.c.task == task, cells.c.scenario == scenario)

    def of_records(self, limits: dict[int, int]) -> ColumnElement[bool]:
        """The condition on `records` beside that on their cells.

        Args:
            limits: the limit of each sweep that had one (`harness.store.catalogue.item_limits`).
        """
        is_metric = records.c.metric == self.metric
        if self.meanings is None:
            return is_metric
        return and_(is_metric, or_(*(_means(limit, windows, limits) for limit, windows in self.meanings)))


def columns(store: Store, sweep: int | None) -> list[Column]:
    """All columns, the leading metrics first: by the catalogue, or by the cells of a sweep."""
    with store.reading() as connection:
        if sweep is None:
            entries = [Entry(*row) for row in connection.execute(select(*catalogue.c))]
        else:
            entries = sorted(measured_in(connection, chosen_cells(sweep)))
    return about(entries)


def about(entries: Sequence[Entry]) -> list[Column]:
    """The columns that entries of the catalogue make up. Pure."""
    scores = [
        Score(
            entry.place if entry.kind == "task" else None,
            entry.metric,
            entry.windows,
            entry.item_limit or None,
        )
        for entry in entries
    ]
    members: dict[tuple[str, str, str, str], list[Entry]] = {}
    everywhere: dict[tuple[str, str, str], set[tuple[int, str]]] = {}
    for entry, meaning in zip(entries, definitions(scores), strict=True):
        place = entry.metric, entry.kind, entry.place
        members.setdefault((*place, meaning), []).append(entry)
        everywhere.setdefault(place, set()).add((entry.item_limit, entry.windows))
    found = []
    for (metric, kind, place, meaning), group in members.items():
        mine = {(entry.item_limit, entry.windows) for entry in group}
        unit = min(entry.unit for entry in group)
        found.append(
            Column(
                name=column_name(metric, place) + (f" ({meaning})" if meaning else ""),
                metric=metric,
                place=place,
                kind=kind,
                unit=unit,
                direction=better(metric, unit, kind),
                models=frozenset(entry.model for entry in group),
                meanings=None if mine == everywhere[metric, kind, place] else tuple(sorted(mine)),
            )
        )
    return sorted(found, key=lambda column: (order_key(column.metric, column.place), column.name))


def leading(offered: Iterable[Column]) -> list[str]:
    """What to show before anything is chosen: some costs, each at one shape, and some scores."""
    offered = list(offered)
    known = [column for column in offered if column.metric in LEADING]
    if not known:
        return [column.name for column in offered[:_LEADING_COSTS]]
    costs: dict[str, str] = {}
    for column in known:
        if column.kind != "task":
            costs.setdefault(column.metric, column.name)
    scores = [column.name for column in known if column.kind == "task"]
    return [*list(costs.values())[:_LEADING_COSTS], *scores[:_LEADING_SCORES]]


def of_models(
    offered: Iterable[Column], models: Collection[str], tasks: Collection[str] = ()
) -> list[Column]:
    """The columns that any of the models has (no models: all), and of tasks only the wanted ones."""
    return [
        column
        for column in offered
        if (not models or column.models & set(models))
        and (not tasks or column.kind != "task" or column.place in tasks)
    ]


def _means(limit: int, windows: str, limits: dict[int, int]) -> ColumnElement[bool]:
    sweeps = [sweep for sweep, value in limits.items() if (value == limit if limit else True)]
    has_limit = cells.c.sweep_id.in_(sweeps) if limit else cells.c.sweep_id.not_in(sweeps)
    if not windows:
        said = or_(records.c.note.is_(None), records.c.note.not_like("%seq_len=%, windows=%"))
        return and_(has_limit, said)
    # The number must end there: 9 windows are not 90.
    end = records.c.note.like(f"%{windows}")
    return and_(has_limit, or_(end, records.c.note.like(f"%{windows},%")))
