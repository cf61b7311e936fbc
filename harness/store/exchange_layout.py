"""What stands in an exported file: the sections, their columns and what each value may be.

All of it follows from the tables, so a new table that hangs on variants, cells or records is exported
and checked without a line here. A row belongs to the last row of its parent section above it::

    machines
    sweeps          name their machine by its number in the file, from 1
    variants
      effects       and whatever else hangs on a variant
      cells         name the sweep that measured them, and the other sweeps that use them
        records
          samples
        items       and whatever else hangs on a cell
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, create_model, field_validator
from sqlalchemy import JSON, Boolean, Column, Integer, Table, Text

from harness.records import CellKind, Status
from harness.store.encoding import CleanText, Real, Whole
from harness.store.tables import cells, machines, metadata, sweeps, variants

__all__ = ["FORMAT", "MAX_DEPTH", "OPTIONAL", "ROOTS", "VERSION", "Section", "sections"]

FORMAT = "harness results"
VERSION = 1
"""Goes up when a file of this version could be misread; a new column or table does not count."""

OPTIONAL = ("effects", "items", "kernels", "samples")
"""Sections that an export may leave out."""

ROOTS = ("machines", "sweeps", "variants")
MAX_DEPTH = 32  # of nested JSON values
_LONGEST_NAME, _LONGEST_TEXT = 10_000, 1_000_000
_HERE_ONLY = {"sweep_cells", "imports", "catalogue"}  # how rows are found in a store, not what was found


@dataclass(frozen=True)
class Section:
    """One kind of row.

    `columns` are those of the file, in order; `stored` those of them that are the table's own;
    `link` is the table's column that refers to the parent row.
    """

    name: str
    table: Table
    parent: str | None
    link: str | None
    columns: tuple[str, ...]
    stored: tuple[str, ...]
    row: type[BaseModel]

    @cached_property
    def has_id(self) -> bool:
        return "id" in self.table.c

    @cached_property
    def unique(self) -> tuple[str, ...]:
        """What tells the rows of one parent apart, where that is not the order they stand in."""
        names = [column.name for column in self.table.primary_key if column.name != self.link]
        return () if self.has_id else tuple(names)


@cache
def sections() -> Mapping[str, Section]:
    """All sections by name, parents before children."""
    found = {
        "machines": _section(machines, own=("facts",)),
        "sweeps": _section(sweeps, leave=("id", "machine_id"), first=("machine",)),
        "variants": _section(variants, leave=("id", "sweep_id")),
    }
    below = {
        "cells": _section(
            cells, "variants", "variant_id", leave=("id", "sweep_id"), first=("sweep", "used_by")
        )
    }
    parents = {**found, **below}
    for table in metadata.sorted_tables:
        if table.name in parents or table.name in _HERE_ONLY:
            continue
        [key] = table.foreign_keys
        parents[table.name] = _section(table, key.column.table.name, key.parent.name, leave=("id",))
    return parents


def _section(
    table: Table,
    parent: str | None = None,
    link: str | None = None,
    *,
    own: tuple[str, ...] | None = None,
    leave: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
) -> Section:
    stored = own or tuple(c.name for c in table.c if c.name not in (*leave, link))
    kinds = {name: _kind(table, table.c[name]) for name in stored}
    references: dict[str, Any] = {
        "machine": (Reference, ...),
        "sweep": (Reference, ...),
        "used_by": (list[Reference], ...),
    }
    fields: dict[str, Any] = {name: references[name] for name in first} | kinds
    row = create_model(table.name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
    return Section(table.name, table, parent, link, (*first, *stored), stored, row)


# --- what a value may be ----------------------------------------------------------------------


_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(\+00:00|Z)$"


def _storable(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds a character that no database can store")
    return text


def _chain(steps: list[dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
    for step in steps:
        if not isinstance(step.get("name"), str) or not isinstance(step.get("options"), dict):
            raise ValueError('must be a list of {"name": ..., "options": {...}}')
    return steps


_NUMBERS = ("_mhz", "_w", "_c", "_bytes")


class Manifest(BaseModel):
    """What the harness reads of a manifest, which may hold more."""

    model_config = ConfigDict(strict=True, extra="allow")

    measuring_version: int | None = None
    time_utc: Annotated[str, Field(pattern=_TIME)] | None = None
    versions: dict[str, str | None] | None = None
    environment: dict[str, str] | None = None
    gpu: dict[str, JsonValue] | None = None
    workload: dict[str, JsonValue] | None = None
    ceilings: dict[str, JsonValue] | None = None
    git: dict[str, JsonValue] | None = None

    @field_validator("gpu")
    @classmethod
    def _numbers(cls, gpu: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        for name, value in (gpu or {}).items():
            if name.endswith(_NUMBERS) and not isinstance(value, int | float | None):
                raise ValueError(f"gpu.{name} must be a number")
        return gpu


def _manifest(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    Manifest.model_validate(value)
    # Which process it was says nothing here, where another may have its number.
    return {name: each for name, each in value.items() if name != "process"}


Reference = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(max_length=_LONGEST_NAME), AfterValidator(_storable)]
LongText = Annotated[str, Field(max_length=_LONGEST_TEXT), AfterValidator(_storable)]
Key = Annotated[str, Field(pattern=r"^[\w.-]{1,200}$")]
Time = Annotated[str, Field(pattern=_TIME)]
Large = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Small = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
SmallCount = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Mapped = dict[str, JsonValue]

_SPECIAL: dict[str, Any] = {
    "machines.facts": Mapped,
    "sweeps.config": Mapped,
    "sweeps.manifest": Annotated[Mapped, AfterValidator(_manifest)],
    "sweeps.manifest_end": Annotated[Mapped, AfterValidator(_manifest)],
    "sweeps.status": Literal["running", "finished", "interrupted"],
    "sweeps.started_at": Time,
    "sweeps.finished_at": Time,
    "variants.key": Key,
    "variants.chain": Annotated[list[Mapped], Field(min_length=1), AfterValidator(_chain)],
    "variants.model_info": Mapped,
    "cells.key": Key,
    "cells.kind": Literal[tuple(str(kind) for kind in CellKind)],
    "cells.status": Literal[tuple(str(status) for status in Status)],
    "cells.scenario": Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")],
    "cells.started_at": Time,
    "cells.seconds": Seconds,
    "items.detail": Mapped,
}
_COUNTED = {"position", "n", "calls", "cells_planned", "parameters", "bytes_before", "bytes_after"}


def _kind(table: Table, column: Column[Any]) -> tuple[Any, Any]:
    """The type and the default of a column, as pydantic takes them."""
    kind = _SPECIAL.get(f"{table.name}.{column.name}") or _by_type(column)
    return (kind | None, None) if column.nullable else (kind, ...)


def _by_type(column: Column[Any]) -> Any:
    kind = column.type
    if isinstance(kind, Whole):
        return Count if column.name in _COUNTED else Large
    if isinstance(kind, Integer):
        return SmallCount if column.name in _COUNTED else Small
    if isinstance(kind, Real):
        return float
    if isinstance(kind, Boolean):
        return bool
    if isinstance(kind, JSON):
        return JsonValue
    if isinstance(kind, CleanText):
        return LongText
    assert isinstance(kind, Text), f"{column} has a type that no file has held yet"
    return Name
