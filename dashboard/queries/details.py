"""What lies behind the figures of a few variants: raw readings, items that changed, kernels, words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import pandas as pd
from sqlalchemy import Select, and_, case, func, or_, select

from harness.store import details as stored
from harness.store.encoding import nan_if_null
from harness.store.frames import count_where, frame_of, typed
from harness.store.store import Store
from harness.store.tables import cells, items, samples, variants
from harness.why import Explanation

from .scope import chosen_cells

__all__ = [
    "Changed",
    "changed_items",
    "explanations",
    "histograms",
    "item_detail",
    "item_places",
    "readings",
    "shapes",
]

_BINS = 12


def readings(store: Store, values: pd.DataFrame) -> pd.DataFrame:
    """The raw readings behind rows of `values`: columns variant, column, position, reading."""
    found = stored.samples(store, values["record"])
    known = values[["record", "variant", "column"]]
    return found.rename(columns={"value": "reading"}).merge(known, on="record").drop(columns="record")


def histograms(store: Store, records: Mapping[int, int]) -> dict[int, list[int]]:
    """How the raw readings of records are spread: counts in twelve equal bins from lowest to highest.

    Args:
        records: variant to record. One with fewer than two different readings is left out.
    """
    found = stored.samples(store, records.values())
    of_record = {record: variant for variant, record in records.items()}
    spread: dict[int, list[int]] = {}
    for record, group in found.groupby("record")["value"]:
        low, high = group.min(), group.max()
        if high > low:
            bins = pd.cut(group, _BINS, labels=False).value_counts()
            spread[of_record[int(str(record))]] = [int(bins.get(number, 0)) for number in range(_BINS)]
    return spread


def item_places(store: Store, first: int, other: int, sweep: int | None) -> dict[str, tuple[int, int, str]]:
    """Where two variants answered items: ``metric · task`` to the newest cell of each and the metric."""
    query = (
        select(cells.c.variant_id, cells.c.task, func.max(cells.c.id))
        .where(cells.c.variant_id.in_([first, other]), cells.c.kind == "task", cells.c.status == "ok")
        .where(chosen_cells(sweep))
        .group_by(cells.c.variant_id, cells.c.task)
    )
    with store.reading() as connection:
        newest = {(variant, task): cell for variant, task, cell in connection.execute(query)}
        kinds = select(items.c.cell_id, items.c.metric).where(items.c.cell_id.in_(newest.values()))
        metrics: dict[int, set[str]] = {}
        for cell, metric in connection.execute(kinds.distinct()):
            metrics.setdefault(cell, set()).add(metric)
    found = {}
    for task in sorted({task for _, task in newest}):
        a, b = newest.get((first, task)), newest.get((other, task))
        if a is not None and b is not None:
            for metric in sorted(metrics.get(a, set()) & metrics.get(b, set())):
                found[f"{metric} · {task}"] = (a, b, metric)
    return found


class Changed(NamedTuple):
    """The items of two cells whose outcomes differ, those that differ most first, as many as asked for."""

    items: int  # that both answered
    changed: int
    rows: pd.DataFrame  # columns index, first, other, change


def changed_items(store: Store, a: int, b: int, metric: str, most: int) -> Changed:
    """What became of single items: outcomes of two cells (a score of 0 or 1, or nats)."""
    of_a, of_b = items.alias("a"), items.alias("b")
    both = and_(of_b.c.position == of_a.c.position, of_b.c.metric == of_a.c.metric, of_b.c.cell_id == b)
    change = of_b.c.outcome - of_a.c.outcome
    # NaN is NULL: an item that only one of them could answer has changed too.
    only_one = of_a.c.outcome.is_(None) != of_b.c.outcome.is_(None)
    differs = or_(of_a.c.outcome != of_b.c.outcome, only_one)

    def over(query: Select[Any]) -> Select[Any]:
        return query.select_from(of_a.join(of_b, both)).where(of_a.c.cell_id == a, of_a.c.metric == metric)

    rows = over(
        select(
            of_a.c.position.label("index"),
            of_a.c.outcome.label("first"),
            of_b.c.outcome.label("other"),
            change.label("change"),
        )
    ).where(differs)
    order = (case((change.is_(None), 0), else_=1), func.abs(change).desc(), of_a.c.position)
    with store.reading() as connection:
        counted = connection.execute(over(select(func.count(), count_where(differs)))).one()
        frame = frame_of(connection, rows.order_by(*order).limit(most))
    frame = typed(frame, floats=("first", "other", "change"), integers=("index",))
    return Changed(int(counted[0]), int(counted[1]), frame)


def item_detail(store: Store, cell: int, metric: str, index: int) -> tuple[float, Mapping[str, Any]]:
    """The outcome of one item and whatever explains it."""
    query = select(items.c.outcome, items.c.detail).where(
        items.c.cell_id == cell, items.c.metric == metric, items.c.position == index
    )
    with store.reading() as connection:
        outcome, detail = connection.execute(query).one()
    return nan_if_null(outcome), detail


def shapes(store: Store, variant_ids: Sequence[int], sweep: int | None) -> list[str]:
    """The shapes in which all of these variants were timed."""
    query = (
        select(cells.c.scenario)
        .where(cells.c.variant_id.in_(list(variant_ids)), cells.c.kind == "scenario", cells.c.status == "ok")
        .where(chosen_cells(sweep))
        .group_by(cells.c.scenario)
        .having(func.count(cells.c.variant_id.distinct()) == len(set(variant_ids)))
        .order_by(func.min(cells.c.id))
    )
    with store.reading() as connection:
        return list(connection.scalars(query))


def explanations(
    store: Store, variant_ids: Iterable[int], shape: str, sweep: int | None
) -> dict[int, Explanation]:
    """Why each variant is as fast as it is in a shape: what ran, achieved against possible, the verdict."""
    wanted = list(variant_ids)
    query = (
        select(cells.c.variant_id, cells.c.kind, func.max(cells.c.id).label("cell"))
        .where(cells.c.variant_id.in_(wanted), cells.c.status == "ok", chosen_cells(sweep))
        .where(or_(cells.c.scenario == shape, cells.c.kind == "transform"))
        .group_by(cells.c.variant_id, cells.c.kind)
    )
    names = ("id", "model", "method", "seed", "synthetic", "simulated")
    about = select(*(variants.c[name] for name in names)).where(variants.c.id.in_(wanted))
    with store.reading() as connection:
        newest = {(row.variant_id, row.kind): row.cell for row in connection.execute(query)}
        known = {row.id: row for row in connection.execute(about)}
    found = {}
    for variant in wanted:
        timed, made = newest.get((variant, "scenario")), newest.get((variant, "transform"))
        if timed is None:
            continue
        row = known[variant]
        found[variant] = Explanation(
            model=row.model,
            method=row.method,
            seed=row.seed,
            scenario=shape,
            synthetic=row.synthetic,
            simulated=row.simulated,
            records={**({} if made is None else _records(store, made)), **_records(store, timed)},
            kernels=store.kernels(timed),
        )
    return found


def has_readings(store: Store, record_ids: Iterable[int]) -> set[int]:
    """The records that have raw readings."""
    query = select(samples.c.record_id).where(samples.c.record_id.in_(sorted(set(record_ids)))).distinct()
    with store.reading() as connection:
        return set(connection.scalars(query))


def _records(store: Store, cell: int) -> dict[str, dict[str, Any]]:
    return {
        metric: {name: None if value != value else value for name, value in asdict(record).items()}
        for metric, record in store.records(cell).items()
    }
