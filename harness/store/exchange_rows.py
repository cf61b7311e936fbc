"""The rows of a file in memory, and the hashes by which the same thing is known in every store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.store.encoding import dump_json
from harness.store.exchange_layout import Section
from harness.store.tables import IMPORTED

__all__ = ["Row", "imported_key", "original_key", "sweep_identity", "variant_digest"]

_DIGITS = 16


@dataclass(slots=True)
class Row:
    """One row with what hangs on it; `values` are named as in the section's columns."""

    section: Section
    values: dict[str, Any]
    children: list[Row] = field(default_factory=list)
    line: int = 0

    def line_of(self) -> str:
        """The row as it stands in the file."""
        return dump_json([self.section.name, *(self.values.get(name) for name in self.section.columns)])

    def walk(self) -> Iterator[Row]:
        """The row and all below it, in the order of the file."""
        yield self
        for child in self.children:
            yield from child.walk()


def sweep_identity(facts: Mapping[str, Any], sweep: Mapping[str, Any]) -> str:
    """What a sweep is known by wherever its rows are copied, whatever part of it was exported.

    Sweeps have a random `sweep_uid` in their manifest; older ones are known by their machine, their
    start (to the millisecond) and their size.
    """
    uid = sweep["manifest"].get("sweep_uid")
    parts = [uid] if isinstance(uid, str) else [dict(facts), sweep["started_at"], sweep["cells_planned"]]
    return _hash(parts)


def variant_digest(variant: Row) -> str:
    """The hash of a variant with all that hangs on it but its cells."""
    parts = [[variant.section.name, _given(variant.values)]]
    parts += [
        [child.section.name, _given(child.values)]
        for child in variant.children
        if child.section.name != "cells"
    ]
    return _hash(parts)


def imported_key(apart: str, key: str) -> str:
    """The key under which an imported variant or cell is stored; no sweep ever asks for it."""
    return f"{IMPORTED}{apart[:_DIGITS]}:{key}"


def original_key(key: str) -> str:
    """The key as it was where it was measured."""
    return key.split(":", 2)[2] if key.startswith(IMPORTED) else key


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    # By name and without what is absent: a column that is added later must not change a hash.
    return {name: values[name] for name in sorted(values) if values[name] is not None}


def _hash(value: Any) -> str:
    return hashlib.sha256(dump_json(value).encode()).hexdigest()
