"""Which rows are meant: the newest of each cell or a sweep's, and the variants that pass the filters.

Everything is said to the database, never sorted out afterwards: a store may hold millions of records.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from sqlalchemy import ColumnElement, Select, func, or_, select

from harness.store.store import Store
from harness.store.tables import cells, records, sweep_cells, sweeps, variants

__all__ = [
    "Filters",
    "Options",
    "Stamp",
    "chosen_cells",
    "is_empty",
    "measured",
    "methods_named",
    "only_model",
    "options",
    "passing",
    "plain_method",
    "stamp",
    "sweep_ids",
]

_MOST_LABELS = 200  # of methods in one list; with more, the list names methods without their options
_OPTIONS_OF_STEP = re.compile(r":[^+]*")
_SEARCHED = (variants.c.method, variants.c.model, variants.c.family, variants.c.device_name)


class Stamp(NamedTuple):
    """Changes whenever anything was added to the store."""

    sweep: int
    cell: int
    record: int
    started_at: str  # of the last sweep, so that a store made anew is not taken for the old one


@dataclass(frozen=True, slots=True)
class Filters:
    """What the reader wants to see; empty means everything.

    `methods` are labels; one without options also means every setting of it (``gptq`` finds
    ``gptq:bits=3``). `tasks` limits which tasks' figures are shown and leaves other kinds of cells alone;
    `statuses` keeps the variants that have a cell with such a status, whole. Every word of `search` must be
    in a variant's method, model, family or device.
    """

    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    search: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """What each filter can be set to, sorted."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    families: tuple[str, ...]
    devices: tuple[str, ...]
    tasks: tuple[str, ...]
    statuses: tuple[str, ...]


def stamp(store: Store) -> Stamp:
    """Cheap: a few look-ups in primary keys."""
    with store.reading() as connection:
        newest_ids = [connection.scalar(select(func.max(t.c.id))) for t in (sweeps, cells, records)]
        started_at = connection.scalar(select(sweeps.c.started_at).where(sweeps.c.id == newest_ids[0]))
    sweep, cell, record = (id_ or 0 for id_ in newest_ids)
    return Stamp(sweep, cell, record, started_at or "")


def sweep_ids(store: Store) -> list[int]:
    """All sweeps, the newest first."""
    with store.reading() as connection:
        return list(connection.scalars(select(sweeps.c.id).order_by(sweeps.c.id.desc())))


def is_empty(store: Store, sweep: int | None) -> bool:
    """Whether there is no cell to show."""
    query = select(cells.c.id) if sweep is None else _of_sweep(sweep)
    with store.reading() as connection:
        return connection.scalar(query.limit(1)) is None


def chosen_cells(sweep: int | None) -> ColumnElement[bool]:
    """The condition on `cells`: the newest of each key, or those of a sweep."""
    if sweep is not None:
        return cells.c.id.in_(_of_sweep(sweep))
    newer = cells.alias("newer")
    again = select(newer.c.id).where(newer.c.key == cells.c.key, newer.c.id > cells.c.id)
    return ~again.correlate(cells).exists()


def options(store: Store, sweep: int | None) -> Options:
    """What the filters offer: only what occurs."""
    names = (variants.c.model, variants.c.family, variants.c.device_name)
    with store.reading() as connection:

        def distinct(query: Select[tuple[str]]) -> tuple[str, ...]:
            return tuple(sorted(connection.scalars(query.distinct())))

        models, families, devices = (distinct(select(name).where(*measured(sweep))) for name in names)
        labels = distinct(select(variants.c.method).where(*measured(sweep)))
        of_sweep = () if sweep is None else (chosen_cells(sweep),)
        tasks = distinct(select(cells.c.task).where(cells.c.kind == "task", *of_sweep))
        statuses = distinct(select(cells.c.status).where(*of_sweep))
    methods = labels
    if len(labels) > _MOST_LABELS:
        methods = tuple(sorted({plain_method(label) for label in labels}))
    return Options(models, methods, families, devices, tasks, statuses)


def plain_method(label: str) -> str:
    """A method's label without options.

    >>> plain_method("smoothquant:alpha=0.5+gptq:bits=4")
    'smoothquant+gptq'
    """
    return _OPTIONS_OF_STEP.sub("", label)


def methods_named(store: Store, wanted: Collection[str]) -> tuple[str, ...]:
    """The labels in the store that these names mean."""
    with store.reading() as connection:
        labels = connection.scalars(select(variants.c.method).distinct())
        return tuple(label for label in labels if label in wanted or plain_method(label) in wanted)


def passing(store: Store, filters: Filters, sweep: int | None) -> list[ColumnElement[bool]]:
    """The conditions on `variants` that filters mean (but `tasks`, which limits what is shown of each)."""
    found: list[ColumnElement[bool]] = measured(sweep)
    methods = methods_named(store, filters.methods) if filters.methods else ()
    for column, wanted, is_set in (
        (variants.c.model, filters.models, filters.models),
        (variants.c.method, methods, filters.methods),
        (variants.c.family, filters.families, filters.families),
        (variants.c.device_name, filters.devices, filters.devices),
    ):
        if is_set:
            found.append(column.in_(wanted))
    if filters.statuses:
        with_status = select(cells.c.variant_id).where(cells.c.status.in_(filters.statuses))
        found.append(variants.c.id.in_(with_status.where(chosen_cells(sweep))))
    found += [_holds(word) for word in filters.search.split()]
    return found


def _holds(word: str) -> ColumnElement[bool]:
    lowered = (func.lower(column).contains(word.lower(), autoescape=True) for column in _SEARCHED)
    # SQLite lowers ASCII alone: what is written with another capital is found as it is written.
    return or_(*lowered, *(column.contains(word, autoescape=True) for column in _SEARCHED))


def _of_sweep(sweep: int) -> Select[tuple[int]]:
    return select(sweep_cells.c.cell_id).where(sweep_cells.c.sweep_id == sweep)


def measured(sweep: int | None) -> list[ColumnElement[bool]]:
    """Variants with a cell to show."""
    if sweep is None:
        return [select(cells.c.id).where(cells.c.variant_id == variants.c.id).correlate(variants).exists()]
    of_sweep = select(cells.c.variant_id).where(cells.c.id.in_(_of_sweep(sweep)))
    return [variants.c.id.in_(of_sweep)]


def only_model(filters: Filters, model: str) -> Filters:
    """The filters, for one model."""
    return replace(filters, models=(model,))
