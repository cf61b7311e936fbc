"""What the Method page shows of a store: who used a method, what it stored, and how much quality it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from sqlalchemy import Select, case, func, select

from harness.comparability import Scope, differences
from harness.conditions import read_conditions
from harness.derive import difference_name
from harness.display import better, order_key
from harness.records import CellKind, Status
from harness.store.frames import count_where, frame_of, reading, typed
from harness.store.selection import current
from harness.store.store import Store
from harness.store.tables import cells, effects, imports, records, variants

from .variant_names import variant_names

__all__ = [
    "MOST_ROWS",
    "MOST_VARIANTS",
    "QUALITY_COLUMNS",
    "against_baseline",
    "places_of",
    "quality_metrics",
    "results_at",
    "used_methods",
    "variants_with",
]

MOST_VARIANTS = 5000
"""A page shows no more variants of one method: the newest ones."""

QUALITY_COLUMNS = (
    "variant", "baseline", "value", "difference", "lower", "upper", "unit", "direction", "compared",
    "caution",
)  # fmt: skip

MOST_ROWS = 300
"""Rows of one table: more of them are no longer read, and drawing them takes longer than finding them."""

_SETTING = ["model", "seed", "dtype", "device_name", "origin"]
_DERIVED = ("_difference", "_rise", "_p", "_detectable")
_PLACE = func.coalesce(cells.c.task, cells.c.scenario, cells.c.kind)


def used_methods(store: Store) -> pd.DataFrame:
    """The names of methods that variants were made with, chains taken apart: columns name, variants, ids."""
    query = select(variants.c.id, variants.c.chain).order_by(variants.c.id)
    with reading(store) as connection:
        found = connection.execute(query).all()
    ids: dict[str, list[int]] = {}
    for id_, chain in found:
        for name in {str(step["name"]) for step in chain}:
            ids.setdefault(name, []).append(id_)
    rows = [(name, len(ids[name]), ids[name]) for name in sorted(ids)]
    return pd.DataFrame(rows, columns=["name", "variants", "ids"], dtype=object)


def variants_with(store: Store, ids: Sequence[int], sweep: int | None) -> pd.DataFrame:
    """The variants with these ids that have cells, one row each, newest last.

    Columns: variant, name, model, method, options (as text), family, dtype, device_name, seed, origin,
    simulated (None: not known), synthetic, ok and not_ok (cells), bits (stored bits per weight), sparsity
    (0 to 1). Bits and sparsity are means over the modules that the transform changed (over all where it
    changed none), by their parameters; None where they were not measured.
    """
    wanted = [int(id_) for id_ in ids]
    counts = (
        select(
            cells.c.variant_id.label("variant"),
            func.max(cells.c.id).label("newest"),
            count_where(cells.c.status == str(Status.OK)).label("ok"),
            count_where(cells.c.status != str(Status.OK)).label("not_ok"),
            func.max(imports.c.origin).label("origin"),
        )
        .outerjoin(imports, imports.c.sweep_id == cells.c.sweep_id)
        .where(cells.c.variant_id.in_(wanted))
        .group_by(cells.c.variant_id)
    )
    about = select(
        variants.c.id.label("variant"), variants.c.model, variants.c.method, variants.c.chain,
        variants.c.family, variants.c.dtype, variants.c.device_name, variants.c.seed, variants.c.simulated,
        variants.c.synthetic,
    ).where(variants.c.id.in_(wanted))  # fmt: skip
    with reading(store) as connection:
        counted = frame_of(connection, counts.where(current(connection, sweep)))
        frame = frame_of(connection, about)
        stored = frame_of(connection, _stored(wanted))
    frame = frame.merge(counted, on="variant").merge(stored, on="variant", how="left")
    frame["options"] = [_options_text(chain) for chain in frame["chain"]]
    frame = frame.sort_values("newest", kind="stable").drop(columns=["chain", "newest"])
    frame = typed(
        frame, integers=("variant", "seed", "ok", "not_ok"), floats=("bits", "sparsity")
    ).reset_index(drop=True)
    frame.insert(1, "name", frame["variant"].map(variant_names(frame)).astype(object))
    return frame


def _stored(ids: Sequence[int]) -> Select[Any]:
    """Bits and sparsity of variants, from what was measured of their modules."""

    def mean(column: Any, *, changed: bool) -> Any:
        known = column.is_not(None)
        if changed:
            known = known & effects.c.changed
        weight = case((known, effects.c.parameters), else_=0)
        return func.sum(weight * func.coalesce(column, 0.0)) / func.nullif(func.sum(weight), 0)

    def targeted(column: Any) -> Any:
        return func.coalesce(mean(column, changed=True), mean(column, changed=False))

    return (
        select(
            effects.c.variant_id.label("variant"),
            targeted(effects.c.stored_bits_per_weight).label("bits"),
            targeted(effects.c.sparsity).label("sparsity"),
        )
        .where(effects.c.variant_id.in_(list(ids)))
        .group_by(effects.c.variant_id)
    )


def _options_text(chain: Sequence[Mapping[str, Any]]) -> str:
    steps = [" ".join(f"{name}={_plain(value)}" for name, value in step["options"].items()) for step in chain]
    return " + ".join(step or "-" for step in steps)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- quality ----------------------------------------------------------------------------------


def quality_metrics(store: Store, ids: Sequence[int], sweep: int | None) -> pd.DataFrame:
    """What the quality of these variants was measured in: columns task, metric, unit, variants.

    Ordered as everywhere: the leading metrics first, then by how many variants have it.
    """
    query = (
        select(
            cells.c.task, records.c.metric, records.c.unit,
            func.count(cells.c.variant_id.distinct()).label("variants"),
        )
        .join(records, records.c.cell_id == cells.c.id)
        .where(cells.c.variant_id.in_([int(id_) for id_ in ids]))
        .where(cells.c.kind == str(CellKind.TASK), cells.c.status == str(Status.OK))
        .group_by(cells.c.task, records.c.metric, records.c.unit)
    )  # fmt: skip
    with reading(store) as connection:
        found = connection.execute(query.where(current(connection, sweep))).all()
    rows = [
        tuple(row)
        for row in found
        if not row.metric.partition(",")[0].endswith(_DERIVED)
        and better(row.metric, row.unit, str(CellKind.TASK)) is not None
    ]
    rows.sort(key=lambda row: (order_key(row[1])[0], -row[3], row[1], row[0]))
    return pd.DataFrame(rows, columns=["task", "metric", "unit", "variants"], dtype=object)


def against_baseline(
    store: Store, about: pd.DataFrame, task: str, metric: str, sweep: int | None
) -> pd.DataFrame:
    """The quality of variants against their baselines: rows of `QUALITY_COLUMNS`, one a variant.

    The baseline is the newest cell of the method-free variant of the same model, seed, type, device and
    origin. Where the paired difference of the same items is stored, it and its interval count
    (``item by item``); else the two values are subtracted, with an interval from both intervals as if they
    were independent (``by intervals``; MOVER, Zou and Donner 2008), or none.

    Args:
        about: rows of `variants_with`.
    """
    paired = difference_name(metric)
    mine = _scores(store, [metric, *([paired] if paired else [])], task, sweep, about["variant"].tolist())
    baselines = _scores(store, [metric], task, sweep, None, sorted(set(about["model"])))
    values = _newest(mine[mine["metric"] == metric], ["variant"])
    told = _newest(mine[mine["metric"] == paired], ["variant"])[["cell", "value", "lower", "upper"]]
    reference = _newest(baselines, _SETTING)
    joined = values.merge(told, on="cell", how="left", suffixes=("", "_told"))
    for frame in (joined, reference):
        frame["origin"] = frame["origin"].where(frame["origin"].notna(), "")  # NULLs do not join
    joined = joined.merge(reference[[*_SETTING, "cell", "value", "lower", "upper"]], on=_SETTING,
                          suffixes=("", "_base"))  # fmt: skip
    joined["baseline"] = joined["value_base"]
    subtracted = joined["value"] - joined["value_base"]
    below = (
        (joined["value"] - joined["lower"]) ** 2 + (joined["upper_base"] - joined["value_base"]) ** 2
    ) ** 0.5
    above = (
        (joined["upper"] - joined["value"]) ** 2 + (joined["value_base"] - joined["lower_base"]) ** 2
    ) ** 0.5
    is_told = joined["value_told"].notna()
    joined["difference"] = joined["value_told"].where(is_told, subtracted)
    joined["compared"] = [
        "item by item" if each else "no interval" if math.isnan(width) else "by intervals"
        for each, width in zip(is_told, below + above, strict=True)
    ]
    joined["lower"] = joined["lower_told"].where(is_told, subtracted - below)
    joined["upper"] = joined["upper_told"].where(is_told, subtracted + above)
    joined["direction"] = [better(metric, str(unit), str(CellKind.TASK)) for unit in joined["unit"]]
    joined["caution"] = _cautions(store, joined)
    return joined[list(QUALITY_COLUMNS)].reset_index(drop=True)


def _scores(
    store: Store,
    metrics: Sequence[str],
    task: str,
    sweep: int | None,
    ids: Sequence[int] | None,
    models: Sequence[str] = (),
) -> pd.DataFrame:
    """The records of a task of some variants, or of the baselines of some models."""
    query = (
        select(
            variants.c.id.label("variant"), variants.c.model, variants.c.seed, variants.c.dtype,
            variants.c.device_name, imports.c.origin, cells.c.id.label("cell"), records.c.metric,
            records.c.value, records.c.lower, records.c.upper, records.c.unit,
        )
        .select_from(
            variants.join(cells, cells.c.variant_id == variants.c.id)
            .join(records, records.c.cell_id == cells.c.id)
            .outerjoin(imports, imports.c.sweep_id == cells.c.sweep_id)
        )
        .where(cells.c.task == task, cells.c.status == str(Status.OK))
        .where(records.c.metric.in_(list(metrics)), records.c.value.is_not(None))
        .order_by(cells.c.id)
    )  # fmt: skip
    if ids is None:
        query = query.where(variants.c.family == "baseline", variants.c.model.in_(list(models)))
        sweep = None  # the baseline of a sweep that reused it, or of an earlier one
    else:
        query = query.where(variants.c.id.in_([int(id_) for id_ in ids]))
    with reading(store) as connection:
        frame = frame_of(connection, query.where(current(connection, sweep)))
    return typed(frame, floats=("value", "lower", "upper"), integers=("variant", "seed", "cell"))


def _newest(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    return frame.drop_duplicates(list(keys), keep="last").copy()


def _cautions(store: Store, joined: pd.DataFrame) -> list[str]:
    """In what a variant's cell and its baseline's were not measured alike."""
    pairs = list(zip(joined["cell"], joined["cell_base"], strict=True))
    conditions = read_conditions(store, {cell for pair in pairs for cell in pair})
    return [
        "; ".join(f"differ in {each}" for each in differences(conditions[a], conditions[b], Scope.QUALITY))
        for a, b in pairs
    ]


# --- everything that was measured -------------------------------------------------------------


def places_of(store: Store, ids: Sequence[int], sweep: int | None) -> list[str]:
    """The tasks and shapes at which these variants have cells, the most frequent first."""
    query = (
        select(_PLACE)
        .where(cells.c.variant_id.in_([int(id_) for id_ in ids]))
        .group_by(_PLACE)
        .order_by(func.count().desc(), _PLACE)
    )
    with reading(store) as connection:
        return list(connection.scalars(query.where(current(connection, sweep))))


def results_at(
    store: Store, about: pd.DataFrame, place: str, sweep: int | None, most: int = MOST_ROWS
) -> tuple[pd.DataFrame, int]:
    """Every current row of variants at a task or shape: one a record, one a cell without records.

    Returns:
        Columns variant, status, metric, value, unit, lower, upper, n, mode, reason and sweep; and how many
        rows there are in all, of which `most` are returned, the newest first.
    """
    query = (
        select(
            cells.c.variant_id.label("variant"), cells.c.status, records.c.metric, records.c.value,
            records.c.unit, records.c.lower, records.c.upper, records.c.n, records.c.mode, cells.c.reason,
            cells.c.sweep_id.label("sweep"),
        )
        .select_from(cells.outerjoin(records, records.c.cell_id == cells.c.id))
        .where(cells.c.variant_id.in_([int(id_) for id_ in about["variant"]]), place == _PLACE)
    )  # fmt: skip
    with reading(store) as connection:
        query = query.where(current(connection, sweep))
        total = connection.scalar(select(func.count()).select_from(query.subquery())) or 0
        frame = frame_of(connection, query.order_by(cells.c.id.desc(), records.c.id).limit(most))
    frame = typed(
        frame,
        floats=("value", "lower", "upper"),
        integers=("variant", "sweep"),
        optional_integers=("n",),
    )
    texts = ["metric", "unit", "mode", "reason"]
    frame[texts] = frame[texts].where(frame[texts].notna(), "")
    frame["variant"] = frame["variant"].map(dict(zip(about["variant"], about["name"], strict=True)))
    return frame, int(total)
