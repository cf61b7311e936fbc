"""What belongs to one variant, cell or record: effects, readings and the outcomes of items."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from sqlalchemy import Engine, and_, select

from harness.store.frames import chunked, frame_of, reading, typed
from harness.store.store import Store
from harness.store.tables import effects as effects_table
from harness.store.tables import items as items_table
from harness.store.tables import kernels as kernels_table
from harness.store.tables import samples as samples_table

__all__ = ["effects", "items", "kernels", "paired_items", "samples"]


def effects(store: Store | Engine, variant: int) -> pd.DataFrame:
    """What the transform of a variant did to each module, in the order of the model."""
    hidden = ("variant_id", "position")
    columns = [column for column in effects_table.c if column.name not in hidden]
    query = select(*columns).where(effects_table.c.variant_id == variant).order_by(effects_table.c.position)
    with reading(store) as connection:
        frame = frame_of(connection, query)
    return typed(
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
    frame = chunked(store, query.order_by(*order), table.c.record_id, record_ids)
    return typed(frame, floats=("value",), integers=("record", "position"))


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
    frame = chunked(store, query, table.c.cell_id, cell_ids)
    return typed(frame, floats=("outcome",), integers=("cell", "index"))


def kernels(store: Store | Engine, cell_ids: Iterable[int]) -> pd.DataFrame:
    """The kernels of cells: columns cell, phase, position, name, family, calls, seconds, share.

    Prefill comes before decode; position 0 is the slowest of a phase.
    """
    table = kernels_table
    query = select(
        table.c.cell_id.label("cell"),
        *(column for column in table.c if column.name != "cell_id"),
    ).order_by(table.c.cell_id, table.c.phase.desc(), table.c.position)
    frame = chunked(store, query, table.c.cell_id, cell_ids)
    return typed(frame, floats=("seconds", "share"), integers=("cell", "position", "calls"))


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
    with reading(store) as connection:
        frame = frame_of(connection, query)
    return typed(frame, floats=("a", "b"), integers=("index",))
