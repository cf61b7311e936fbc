"""From a query to a DataFrame with the right types, the same for every question that is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Engine, Select, case, func

from harness.errors import StoreError
from harness.store.chunks import chunks
from harness.store.failures import translated
from harness.store.store import Store

__all__ = ["chunked", "count_where", "frame_of", "reading", "typed"]


@contextmanager
def reading(store: Store | Engine) -> Iterator[Connection]:
    """A connection to a store, or to an engine on one; errors become a `StoreError`."""
    engine, label = (store.engine, store.label) if isinstance(store, Store) else (store, str(store.url))
    with translated(label), engine.connect() as connection:
        yield connection


def frame_of(connection: Connection, query: Select[Any]) -> pd.DataFrame:
    """The rows of a query as objects, under the names of its columns."""
    found = connection.execute(query)
    rows = found.all()
    # SQLite keeps bytes in a column of text as they are; no column of a store is for bytes.
    if any(isinstance(value, bytes) for row in rows for value in row):
        raise StoreError(
            f"results store {connection.engine.url.database}: damaged (bytes where a text belongs)"
        )
    # Everything is an object first, so that a missing text is None and not a NaN.
    return pd.DataFrame(
        {
            name: pd.Series([row[place] for row in rows], dtype=object)
            for place, name in enumerate(found.keys())
        }
    )


def chunked(
    store: Store | Engine, query: Select[Any], column: ColumnElement[Any], ids: Iterable[int]
) -> pd.DataFrame:
    """The rows whose `column` is one of the ids, however many ids there are."""
    wanted = sorted({int(id_) for id_ in ids})
    with reading(store) as connection:
        frames = [frame_of(connection, query.where(column.in_(chunk))) for chunk in chunks(wanted) or [[]]]
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def typed(
    frame: pd.DataFrame,
    *,
    floats: Sequence[str] = (),
    integers: Sequence[str] = (),
    optional_integers: Sequence[str] = (),
    booleans: Sequence[str] = (),
) -> pd.DataFrame:
    """The frame with these columns as numbers or booleans; all others stay objects."""
    types = {
        **dict.fromkeys(floats, "float64"),
        **dict.fromkeys(integers, "int64"),
        **dict.fromkeys(optional_integers, "Int64"),
        **dict.fromkeys(booleans, "bool"),
    }
    return frame.astype(types)


def count_where(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """How many rows of a group fulfil the condition; 0 for an empty one."""
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)
