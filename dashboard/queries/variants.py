"""What a variant is: its labels, marks and options, its baseline, and how its cells ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from sqlalchemy import func, select

from harness.store.chunks import chunks
from harness.store.frames import count_where, frame_of, typed
from harness.store.store import Store
from harness.store.tables import cells, effects, imports, records, variants

from ..variant_names import variant_names
from .columns import Column
from .scope import Filters, chosen_cells, measured, passing
from .values import limits_for, newest_of

__all__ = [
    "ATTRIBUTES",
    "baselines",
    "changes",
    "described",
    "how_cells_ended",
    "knobs_text",
    "marks_text",
    "matching",
    "named",
    "option_table",
    "shown",
]

ATTRIBUTES = {"newest": variants.c.id, "model": variants.c.model, "method": variants.c.method}
"""What variants can be sorted by beside a column."""

_ABOUT = (
    "variant", "model", "method", "marks", "knobs", "options", "family", "seed", "dtype", "device_name",
    "origin",
)  # fmt: skip
_OF_VARIANTS = ("model", "method", "family", "dtype", "device_name")
_SETTING = ("model", "seed", "dtype", "device_name", "origin")


def shown(
    store: Store,
    filters: Filters,
    sweep: int | None,
    *,
    by: Column | str = "newest",
    descending: bool = True,
    first: int = 0,
    count: int = 50,
) -> list[int]:
    """The variants of one page, in order; those without a value come last.

    Args:
        by: a column, or one of `ATTRIBUTES`.
        first: how many are on the pages before.
    """
    query = select(variants.c.id).where(*passing(store, filters, sweep))
    with store.reading() as connection:
        if isinstance(by, Column):
            found = newest_of(by, sweep, limits_for(connection, [by]))
            query = query.outerjoin(records, records.c.id == found)
            key: Any = records.c.value
        else:
            key = ATTRIBUTES[by]
        ordered = key.desc() if descending else key.asc()
        query = query.order_by(ordered.nulls_last(), variants.c.id.desc()).limit(count).offset(first)
        return list(connection.scalars(query))


def described(store: Store, variant_ids: Sequence[int]) -> pd.DataFrame:
    """One row a variant, in the order of the ids; options are read only of these.

    Columns: variant, model, method, ``marks`` (simulated, synthetic, imported or nothing), ``knobs`` (the
    options as text), options, family, seed, dtype, device_name, origin, and ``name``.
    """
    query = select(
        variants.c.id.label("variant"),
        *(
            variants.c[name]
            for name in ("model", "method", "chain", "family", "seed", "dtype", "device_name")
        ),
        variants.c.synthetic,
        variants.c.simulated,
        imports.c.origin,
    ).outerjoin(imports, imports.c.sweep_id == variants.c.sweep_id)
    with store.reading() as connection:
        parts = [
            frame_of(connection, query.where(variants.c.id.in_(part))) for part in chunks(variant_ids) or [[]]
        ]
    frame = pd.concat(parts, ignore_index=True).set_index("variant").loc[list(variant_ids)].reset_index()
    options = [[dict(step["options"]) for step in chain] for chain in frame["chain"]]
    frame["options"] = pd.Series([steps[0] if len(steps) == 1 else steps for steps in options], dtype=object)
    frame["knobs"] = pd.Series([knobs_text(each) for each in frame["options"]], dtype=object)
    frame["marks"] = pd.Series(
        [
            marks_text(simulated=bool(simulated), synthetic=bool(synthetic), imported=origin is not None)
            for simulated, synthetic, origin in zip(
                frame["simulated"], frame["synthetic"], frame["origin"], strict=True
            )
        ],
        dtype=object,
    )
    return named(typed(frame[list(_ABOUT)], integers=("variant", "seed")))


def knobs_text(options: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Options as text: ``bits=3 group_size=128``, the steps of a chain joined by a plus sign."""
    if isinstance(options, Mapping):
        return " ".join(f"{name}={value}" for name, value in options.items())
    return " + ".join(knobs_text(step) or "-" for step in options)


def marks_text(*, simulated: bool, synthetic: bool, imported: bool = False) -> str:
    """What a reader must know before believing a row."""
    return ", ".join(["simulated"] * simulated + ["synthetic"] * synthetic + ["imported"] * imported)


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The variants with a ``name`` that is no longer than it must be to be unique among them."""
    names = variant_names(frame, _SETTING[:-1])  # where a row came from is among its marks
    return frame.assign(name=frame["variant"].map(names).astype(object))


def baselines(store: Store, about: pd.DataFrame, sweep: int | None) -> dict[int, int]:
    """The baseline of each variant: of the same model, seed, dtype, device and origin, the newest one.

    Args:
        about: rows of `described`; baselines themselves have none.
    """
    query = (
        select(variants.c.id, *(variants.c[name] for name in _SETTING[:-1]), imports.c.origin)
        .outerjoin(imports, imports.c.sweep_id == variants.c.sweep_id)
        .where(variants.c.family == "baseline", variants.c.model.in_(sorted(set(about["model"]))))
        .where(*measured(sweep))
        .order_by(variants.c.id)
    )
    with store.reading() as connection:
        by_setting = {tuple(row[1:]): row[0] for row in connection.execute(query)}
    found = {}
    for row in about[about["family"] != "baseline"].to_dict("records"):
        baseline = by_setting.get(tuple(row[name] for name in _SETTING))
        if baseline is not None:
            found[int(row["variant"])] = baseline
    return found


def how_cells_ended(store: Store, sweep: int | None) -> pd.DataFrame:
    """How many cells of each variant ended how: columns variant, status, cells. Counted in the database."""
    query = (
        select(cells.c.variant_id.label("variant"), cells.c.status, func.count().label("cells"))
        .where(chosen_cells(sweep))
        .group_by(cells.c.variant_id, cells.c.status)
        .order_by(cells.c.variant_id, cells.c.status)
    )
    with store.reading() as connection:
        return typed(frame_of(connection, query), integers=("variant", "cells"))


def matching(store: Store, filters: Filters, sweep: int | None) -> list[int]:
    """The ids of the variants that pass, the newest first."""
    query = select(variants.c.id).where(*passing(store, filters, sweep)).order_by(variants.c.id.desc())
    with store.reading() as connection:
        return list(connection.scalars(query))


def option_table(about: pd.DataFrame) -> pd.DataFrame:
    """The options of variants side by side: one row an option, one column a variant, as text."""
    table: dict[str, dict[str, str]] = {}
    for row in about.to_dict("records"):
        steps = [row["options"]] if isinstance(row["options"], Mapping) else row["options"]
        column = {name: str(row[name]) for name in _OF_VARIANTS}
        for number, options in enumerate(steps, start=1):
            prefix = f"step {number}: " if len(steps) > 1 else ""
            for name, value in options.items():
                # A method may have an option that is named as what variants have themselves.
                is_taken = not prefix and name in (*_OF_VARIANTS, "marks")
                column[f"option {name}" if is_taken else f"{prefix}{name}"] = str(value)
        table[row["name"]] = column | {"marks": row["marks"]}
    return pd.DataFrame(table, dtype=object).fillna("")


def changes(store: Store, variant_ids: Sequence[int]) -> pd.DataFrame:
    """What the transforms changed, one row a variant: modules, modules_changed, bytes_before, bytes_after,
    simulated (None until it was measured)."""
    table = effects
    query = (
        select(
            variants.c.id.label("variant"),
            func.count(table.c.position).label("modules"),
            count_where(table.c.changed).label("modules_changed"),
            func.sum(table.c.bytes_before).label("bytes_before"),
            func.sum(table.c.bytes_after).label("bytes_after"),
            variants.c.simulated,
        )
        .outerjoin(table, table.c.variant_id == variants.c.id)
        .where(variants.c.id.in_(list(variant_ids)))
        .group_by(variants.c.id, variants.c.simulated)
    )
    with store.reading() as connection:
        frame = frame_of(connection, query)
    counts = ("modules", "modules_changed", "bytes_before", "bytes_after")
    frame = typed(frame, integers=("variant",), optional_integers=counts)
    return frame.set_index("variant").loc[list(variant_ids)].reset_index()
