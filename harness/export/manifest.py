"""The row's manifest, as it travels with the checkpoint in ``harness.json``.

Host names, absolute paths and passwords stay behind, as in `harness results export`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

import harness
from harness.export.remaking import StoredVariant
from harness.privacy import in_texts, without_identity
from harness.store.encoding import nan_if_null
from harness.store.tables import cells, records

if TYPE_CHECKING:
    from harness.store.store import Store

__all__ = ["VERSION", "manifest_of"]

VERSION = 1
"""Of the layout of ``harness.json``; higher where an entry changes its meaning."""

_STORE_OPTION = re.compile(r"\s--db[=\s]\s*\S+")
_MACHINE = (
    "device",
    "device_name",
    "cpu",
    "cpu_count",
    "ram_bytes",
    "cuda",
    "cudnn",
    "python",
    "torch_threads",
)


def manifest_of(store: Store, found: StoredVariant, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known of a variant: what it is, how it was made and what was measured.

    Args:
        checkpoint: what is said of the files themselves.
    """
    row, sweep = found.row, found.sweep
    about = sweep["manifest"]
    host = about.get("hostname")
    names = (host,) if isinstance(host, str) else ()
    manifest = {
        "format": "harness export",
        "version": VERSION,
        "made_by": f"transformer-harness {harness.__version__}",
        "variant": {
            "content_key": row["key"],
            "model": row["model"],
            "model_identity": row["model_identity"],
            "model_info": row["model_info"],
            "method": row["method"],
            "chain": row["chain"],
            "family": row["family"],
            "seed": row["seed"],
            "dtype": row["dtype"],
            "synthetic": row["synthetic"],
            "simulated": row["simulated"],
        },
        "checkpoint": dict(checkpoint),
        "measured": {
            "command": _STORE_OPTION.sub("", sweep["command"]),
            "config": sweep["config"],
            "started_at": sweep["started_at"],
            "machine": {name: about.get(name) for name in _MACHINE},
            "versions": about.get("versions"),
            "measuring_version": about.get("measuring_version"),
            "git": about.get("git"),
            "cells": _cells(store, found.id),
        },
    }
    cleaned: dict[str, Any] = in_texts(manifest, partial(without_identity, names=names))
    return cleaned


def _cells(store: Store, variant_id: int) -> list[dict[str, Any]]:
    """The newest cell of each key of the variant with its records, without raw readings."""
    columns = ("id", "key", "kind", "task", "scenario", "status", "reason", "started_at", "seconds")
    query = select(*(cells.c[name] for name in columns)).where(cells.c.variant_id == variant_id)
    with store.reading() as connection:
        rows = connection.execute(query.order_by(cells.c.id)).mappings()
        found = {row["key"]: dict(row) for row in rows}
        for cell in found.values():
            its = select(records).where(records.c.cell_id == cell.pop("id")).order_by(records.c.id)
            cell["records"] = [_record(dict(row)) for row in connection.execute(its).mappings()]
    return list(found.values())


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what is empty."""
    record = {
        "metric": row["metric"],
        "value": nan_if_null(row["value"]),
        "unit": row["unit"],
        "n": row["n"],
    }
    for name in ("lower", "upper", "mode", "note"):
        if row[name] is not None:
            record[name] = row[name]
    return record
