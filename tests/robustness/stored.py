"""What a store holds, read with nothing but sqlite3, and what must hold of it whatever happened."""

from __future__ import annotations

import sqlite3
from contextlib import closing

# What a repetition must give again to the last digit, and what must only be there.
EXACT = ("acc", "acc_difference", "flips", "kv_cache_bytes_per_token", "weight_bytes")
TIMED = ("prefill_latency", "decode_latency", "transform_s", "transform_peak_bytes")


def rows(folder, query, *values):
    with closing(sqlite3.connect(folder / "results.db")) as connection:
        return connection.execute(query, values).fetchall()


def assert_whole(folder):
    """Whole cells only, each measured once."""
    assert rows(folder, "PRAGMA integrity_check") == [("ok",)]
    assert rows(folder, "PRAGMA foreign_key_check") == []
    if not _has_cells(folder):  # killed before the schema was written
        return
    doubled = rows(folder, "SELECT key FROM cells GROUP BY key HAVING count(*) > 1")
    assert doubled == []
    unlinked = rows(folder, "SELECT id FROM cells WHERE id NOT IN (SELECT cell_id FROM sweep_cells)")
    assert unlinked == []


def _has_cells(folder):
    return bool(rows(folder, "SELECT 1 FROM sqlite_master WHERE name = 'cells'"))


def cells(folder):
    """Every cell by its id: key, status, and when it was measured."""
    if not _has_cells(folder):
        return {}
    return {row[0]: row[1:] for row in rows(folder, "SELECT id, key, status, started_at, seconds FROM cells")}


def current(folder):
    """The newest cell of each key: how it ended, what it measured, and its items."""
    found = {}
    for id_, key, status, reason in rows(
        folder, "SELECT max(id), key, status, reason FROM cells GROUP BY key ORDER BY key"
    ):
        records = {
            metric: value if metric in EXACT else None
            for metric, value in rows(folder, "SELECT metric, value FROM records WHERE cell_id = ?", id_)
            if metric in EXACT + TIMED
        }
        items = rows(
            folder,
            "SELECT metric, position, outcome FROM items WHERE cell_id = ? ORDER BY metric, position",
            id_,
        )
        found[key] = (status, reason, records, items)
    return found


def statuses(folder):
    """The statuses and reasons of the newest cells: {method: {label: (status, reason)}}."""
    found = {}
    query = """
        SELECT method, coalesce(task, scenario, 'transform'), status, coalesce(reason, ''), max(cells.id)
        FROM cells JOIN variants ON variants.id = variant_id GROUP BY cells.key"""
    for method, label, status, reason, _ in rows(folder, query):
        found.setdefault(method, {})[label] = (status, reason)
    return found
