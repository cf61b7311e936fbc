"""Which cells are meant: the current ones or a sweep's, and the filters that all commands share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, and_, case, func, or_, select

from harness.errors import UnknownName
from harness.records import CellKind
from harness.store.tables import cells, imports, records, sweep_cells, sweeps, variants

__all__ = ["TRANSFORM_LABEL", "current", "narrowed", "require_known", "scenario_label", "sweep_number"]

TRANSFORM_LABEL = "transform"
Query = TypeVar("Query", bound=Select[*tuple[Any, ...]])

scenario_label: ColumnElement[Any] = func.coalesce(
    cells.c.scenario,
    # A transform cell has no scenario of its own; its rows are found under this name.
    case((cells.c.kind == str(CellKind.TRANSFORM), TRANSFORM_LABEL), else_=None),
)


def current(connection: Connection, sweep: int | Literal["last"] | None) -> ColumnElement[bool]:
    """The condition on `cells`: the newest of each key, or all cells of a sweep.

    Raises:
        UnknownName: no such sweep.
    """
    number = sweep_number(connection, sweep)
    if number is None:
        # Asked cell by cell in the index of keys: a query about a few cells need not group them all.
        newer = cells.alias("newer")
        is_newer = (newer.c.key == cells.c.key) & (newer.c.id > cells.c.id)
        return ~select(newer.c.id).where(is_newer).correlate(cells).exists()
    return cells.c.id.in_(select(sweep_cells.c.cell_id).where(sweep_cells.c.sweep_id == number))


def sweep_number(connection: Connection, sweep: int | Literal["last"] | None) -> int | None:
    """The id of the sweep that is meant; ``last`` is the newest that was measured here.

    Only where nothing was, it is the newest of the imported ones; 0 in an empty store.

    Raises:
        UnknownName: no such sweep.
    """
    if sweep is None:
        return None
    query = select(sweeps.c.id, imports.c.origin).outerjoin(imports, imports.c.sweep_id == sweeps.c.id)
    origins = {row.id: row.origin for row in connection.execute(query)}
    if sweep == "last":
        here = [id_ for id_, origin in origins.items() if origin is None]
        return max(here or origins, default=0)
    if sweep not in origins:
        raise UnknownName("sweep", str(sweep), map(str, origins))
    return sweep


def narrowed(
    query: Query,
    *,
    models: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    scenarios: Iterable[str] | None = None,
    metrics: Iterable[str] | None = None,
    statuses: Iterable[str] | None = None,
) -> Query:
    """A query over `cells`, `variants` and (for `metrics`) `records` with the filters that are given.

    All are exact but `methods`, where a name without options also means every setting of it.
    """
    for column, wanted in (
        (variants.c.model, models),
        (cells.c.task, tasks),
        (scenario_label, scenarios),
        (records.c.metric, metrics),
        (cells.c.status, statuses),
    ):
        if wanted is not None:
            query = query.where(column.in_([str(name) for name in wanted]))
    return query if methods is None else query.where(_is_method(methods))


def require_known(
    connection: Connection,
    *,
    models: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    metrics: Iterable[str] | None = None,
) -> None:
    """Refuse names, as `narrowed` takes them, of which a store has nothing at all: they are misspelt.

    Raises:
        UnknownName: one of them; names the near ones.
    """
    for kind, column, wanted in (
        ("model", variants.c.model, models),
        ("method", variants.c.method, methods),
        ("task", cells.c.task, tasks),
        ("metric", records.c.metric, metrics),
    ):
        for name in wanted or ():
            is_it = _is_method([name]) if kind == "method" else column == name
            if connection.execute(select(column).where(is_it).limit(1)).first() is None:
                known = connection.execute(select(column).where(column.is_not(None)).distinct())
                raise UnknownName(f"{kind} in this store:", name, known.scalars())


def _is_method(labels: Iterable[str]) -> ColumnElement[bool]:
    label = variants.c.method
    either: list[ColumnElement[bool]] = []
    for wanted in labels:
        either.append(label == wanted)
        if not set(wanted) & set(":+"):
            with_options = label.startswith(f"{wanted}:", autoescape=True)
            either.append(and_(with_options, label.not_like("%+%")))
    return or_(False, *either)
