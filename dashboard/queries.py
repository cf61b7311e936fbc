"""What the pages show: a store in, DataFrames out.

Rows of `load` are records of current cells (or of one sweep's), as `harness.store.queries.results`
returns them, with these columns added:

- ``place``: the task, the shape, or ``transform``;
- ``column``: metric and place together, with what tells scores of one name apart (``limit 10``), which
  names one thing that can be compared;
- ``knobs``: the options as text; ``marks``: ``simulated``, ``synthetic``, ``imported``, or nothing;
- ``name``: the variant as charts and lists call it, unique over the frame.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd
from sqlalchemy import func, select

from harness.comparability import Conditions, differences, read_conditions, scope_of
from harness.display import COUNTED, LEADING, better, column_name, order_key
from harness.evaluate.definitions import Score, definitions
from harness.evaluate.paired import paired_bootstrap_difference
from harness.records import Status
from harness.store import queries as stored
from harness.store.store import Store
from harness.store.tables import cells, records, sweeps

__all__ = [
    "DELTA_COLUMNS",
    "Filters",
    "Stamp",
    "columns_of",
    "deltas",
    "failures",
    "filtered",
    "leading_columns",
    "load",
    "named",
    "newest",
    "option_table",
    "overview",
    "pairs_of",
    "points",
    "stamp",
]

IDENTITY_COLUMNS = ("model", "method", "marks", "cells")
SETTING_COLUMNS = ("knobs", "family", "seed", "dtype", "device_name", "sweep")
DELTA_COLUMNS = (
    "variant", "name", "model", "method", "marks", "metric", "place", "column", "unit", "direction",
    "baseline", "value", "delta", "lower", "upper", "ratio", "verdict", "compared", "flag",
)  # fmt: skip
_LEADING_COSTS, _LEADING_SCORES = 4, 5
_SETTING = ["model", "seed", "dtype", "device_name", "origin"]


class Stamp(NamedTuple):
    """Changes whenever anything was added to the store."""

    sweep: int
    cell: int
    record: int
    started_at: str  # of the last sweep, so that a store made anew is not taken for the old one


@dataclass(frozen=True, slots=True)
class Filters:
    """What the reader wants to see; empty means everything.

    `tasks` limits which tasks' figures are shown and leaves other kinds of cells alone; `statuses`
    keeps the variants that have a cell with such a status, whole.
    """

    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()


def stamp(store: Store) -> Stamp:
    """Cheap: a few look-ups in primary keys."""
    with store.reading() as connection:
        newest_ids = [connection.scalar(select(func.max(t.c.id))) for t in (sweeps, cells, records)]
        started_at = connection.scalar(select(sweeps.c.started_at).where(sweeps.c.id == newest_ids[0]))
    sweep, cell, record = (id_ or 0 for id_ in newest_ids)
    return Stamp(sweep, cell, record, started_at or "")


def load(store: Store, sweep: int | Literal["last"] | None = None) -> pd.DataFrame:
    """The records of the current cells, or of one sweep's cells, with the columns named above."""
    frame = stored.results(store, sweep=sweep)
    place = frame["task"].where(frame["task"].notna(), frame["scenario"])
    frame["place"] = place.where(place.notna(), frame["kind"])
    conditions = read_conditions(store, frame["cell"])
    meanings = definitions(
        [
            Score(task, metric, note, conditions[cell].limit)
            for task, metric, note, cell in zip(
                frame["task"], frame["metric"], frame["note"], frame["cell"], strict=True
            )
        ]
    )
    frame["column"] = [
        None if metric is None else column_name(metric, place) + (f" ({meaning})" if meaning else "")
        for metric, place, meaning in zip(frame["metric"], frame["place"], meanings, strict=True)
    ]
    frame["knobs"] = [knobs_text(options) for options in frame["options"]]
    frame["marks"] = [
        marks_text(simulated=simulated is True, synthetic=synthetic, imported=origin is not None)
        for simulated, synthetic, origin in zip(
            frame["simulated"], frame["synthetic"], frame["origin"], strict=True
        )
    ]
    return named(frame.astype(dict.fromkeys(("place", "column", "knobs", "marks"), object)))


def knobs_text(options: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Options as text: ``bits=3 group_size=128``, the steps of a chain joined by a plus sign."""
    if isinstance(options, Mapping):
        return " ".join(f"{name}={value}" for name, value in options.items())
    return " + ".join(knobs_text(step) or "-" for step in options)


def marks_text(*, simulated: bool, synthetic: bool, imported: bool = False) -> str:
    """What a reader must know before believing a row."""
    return ", ".join(["simulated"] * simulated + ["synthetic"] * synthetic + ["imported"] * imported)


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with a ``name`` for each variant that is no longer than it must be to be unique."""
    return frame.assign(name=frame["variant"].map(_names(frame)).astype(object))


def _names(frame: pd.DataFrame) -> dict[int, str]:
    table = frame.drop_duplicates("variant").set_index("variant")
    parts = ["method"] + [
        column for column in ("model", "seed", "dtype", "device_name") if table[column].nunique() > 1
    ]
    names = {
        variant: " · ".join(f"seed {row[part]}" if part == "seed" else str(row[part]) for part in parts)
        for variant, row in table[parts].iterrows()
    }
    counts = pd.Series(names, dtype=object).value_counts()
    return {variant: name if counts[name] == 1 else f"{name} · #{variant}" for variant, name in names.items()}


# --- choosing rows ----------------------------------------------------------------------------


def filtered(frame: pd.DataFrame, filters: Filters) -> pd.DataFrame:
    """The rows that the filters leave."""
    keep = pd.Series(True, index=frame.index)
    for column, wanted in (
        ("model", filters.models),
        ("method", filters.methods),
        ("family", filters.families),
        ("device_name", filters.devices),
    ):
        if wanted:
            keep &= frame[column].isin(wanted)
    if filters.statuses:
        with_status = frame.loc[frame["status"].isin(filters.statuses), "variant"]
        keep &= frame["variant"].isin(set(with_status))
    if filters.tasks:
        keep &= frame["task"].isna() | frame["task"].isin(filters.tasks)
    return frame[keep]


def newest(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each variant and column: where two cells measured the same thing under different
    settings, the newer one."""
    measured = frame[frame["column"].notna()]
    return measured.sort_values("cell", kind="stable").drop_duplicates(["variant", "column"], keep="last")


def columns_of(frame: pd.DataFrame, kinds: Collection[str] = ()) -> pd.DataFrame:
    """What there is to compare: one row a column, with metric, place, unit, kind and direction; the
    leading metrics first."""
    measured = frame[frame["column"].notna()]
    if kinds:
        measured = measured[measured["kind"].isin(kinds)]
    table = measured.drop_duplicates("column")[["column", "metric", "place", "unit", "kind"]]
    rows = sorted(table.itertuples(index=False), key=lambda row: order_key(str(row.metric), str(row.place)))
    ordered = pd.DataFrame(rows, columns=list(table.columns), dtype=object)
    ordered["direction"] = [better(row.metric, row.unit, row.kind) for row in rows]
    return ordered


def leading_columns(about: pd.DataFrame) -> list[str]:
    """What to show before anything is chosen: some costs, each at one shape, and some scores.

    Args:
        about: rows of `columns_of`.
    """
    leading = about[about["metric"].isin(LEADING)]
    if leading.empty:
        return list(about["column"][:_LEADING_COSTS])
    scores = leading["kind"] == "task"
    costs = leading[~scores & ~leading["metric"].duplicated()]
    return [*costs["column"][:_LEADING_COSTS], *leading.loc[scores, "column"][:_LEADING_SCORES]]


# --- tables -----------------------------------------------------------------------------------


def overview(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """One row a variant: what it is, how its cells ended, a value for each of the columns, settings.

    The index is the variant; `sweep` is the last one that measured any of its cells. Values are
    raw, in the unit that was stored.
    """
    by_variant = frame.drop_duplicates(["variant", "cell"]).groupby("variant", sort=False)
    about = frame.drop_duplicates("variant").set_index("variant")
    about = about.assign(cells=by_variant["status"].agg(_status_text), sweep=by_variant["sweep"].max())
    values = newest(frame).pivot(index="variant", columns="column", values="value")
    identity, settings = about[list(IDENTITY_COLUMNS)], about[list(SETTING_COLUMNS)]
    return identity.join(values.reindex(columns=list(columns))).join(settings)


def _status_text(statuses: pd.Series) -> str:
    counts = statuses.value_counts().sort_index()
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def points(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The variants that have both columns: ``x``, ``y``, their bounds, and what the variant is."""
    rows = newest(frame)
    about = ["variant", "name", "model", "method", "knobs", "family", "device_name", "marks"]
    sides = [
        rows[rows["column"] == column]
        .set_index("variant")[["value", "lower", "upper"]]
        .rename(columns={"value": axis, "lower": f"{axis}_lower", "upper": f"{axis}_upper"})
        for column, axis in ((x, "x"), (y, "y"))
    ]
    described = rows.drop_duplicates("variant")[about].set_index("variant")
    joined = described.join(sides, how="inner").dropna(subset=["x", "y"])
    return joined.reset_index()


def pairs_of(frame: pd.DataFrame) -> dict[int, int]:
    """The baseline of each variant: of the same model, seed, dtype and device, the newest one."""
    variants = frame.drop_duplicates("variant")
    baselines = variants[variants["family"] == "baseline"].sort_values("variant")
    by_setting = {
        tuple(row[name] for name in _SETTING): int(row["variant"]) for _, row in baselines.iterrows()
    }
    found = {}
    for _, row in variants.iterrows():
        baseline = by_setting.get(tuple(row[name] for name in _SETTING))
        if baseline is not None and row["family"] != "baseline":
            found[int(row["variant"])] = baseline
    return found


def deltas(
    store: Store,
    frame: pd.DataFrame,
    columns: Sequence[str],
    pairs: Mapping[int, int] | None = None,
) -> pd.DataFrame:
    """Each variant against its baseline: difference with a 95 % interval, ratio and verdict.

    Task scores whose stored outcomes of single items explain the stored value are compared item by
    item (paired bootstrap). Everything else is compared through the two intervals, as independent
    measurements (MOVER: Zou and Donner 2008, Statistics in Medicine 27), which is cautious.

    Bytes that are counted, not sampled, differ by exactly what they differ by.

    Args:
        frame: rows of `load`; baselines must be among them.
        columns: which columns to compare, in the order of the rows of a variant.
        pairs: variant to what it is compared with; by default `pairs_of`.

    Returns:
        `DELTA_COLUMNS`; `verdict` is ``better``, ``worse``, ``equal``, ``no clear difference``, or
        empty where there is no interval or no direction; `flag` names what makes a comparison
        doubtful.
    """
    pairs = pairs_of(frame) if pairs is None else pairs
    rows = newest(frame)
    rows = rows[rows["column"].isin(set(columns))]
    by_place = {(int(row["variant"]), row["column"]): row for _, row in rows.iterrows()}
    conditions = read_conditions(store, rows["cell"])
    compared = []
    for variant, baseline in pairs.items():
        for column in columns:
            a, b = by_place.get((baseline, column)), by_place.get((variant, column))
            if a is not None and b is not None:
                compared.append(_delta(store, a, b, conditions))
    return pd.DataFrame(compared, columns=list(DELTA_COLUMNS)).astype(
        dict.fromkeys(("baseline", "value", "delta", "lower", "upper", "ratio"), "float64")
    )


def _delta(
    store: Store, baseline: pd.Series, row: pd.Series, conditions: Mapping[int, Conditions]
) -> dict[str, Any]:
    interval = _paired_interval(store, baseline, row)
    paired = interval is not None
    lower, upper = interval or _independent_interval(baseline, row)
    compared = "item by item" if paired else "by intervals"
    if row["metric"] in COUNTED:
        lower = upper = row["value"] - baseline["value"]
        compared = "counted"
    elif math.isnan(lower) or math.isnan(upper):
        compared = "no interval"
    direction = better(row["metric"], row["unit"], row["kind"])
    flags = []
    if baseline["sweep"] != row["sweep"]:
        flags.append("measured in different sweeps")
    scope = scope_of(row["kind"], row["unit"] or "", row["metric"])
    found = differences(conditions[int(baseline["cell"])], conditions[int(row["cell"])], scope)
    flags += [f"not comparable, {each}" for each in found]
    if baseline["mode"] != row["mode"]:
        flags.append(f"timed differently ({baseline['mode']} and {row['mode']})")
    if not paired and row["kind"] == "task" and baseline["n"] != row["n"]:
        flags.append(f"different items ({baseline['n']} and {row['n']})")
    return {
        **{
            name: row[name]
            for name in ("variant", "name", "model", "method", "marks", "metric", "place", "column")
        },
        "unit": row["unit"],
        "direction": direction,
        "baseline": baseline["value"],
        "value": row["value"],
        "delta": row["value"] - baseline["value"],
        "lower": lower,
        "upper": upper,
        "ratio": row["value"] / baseline["value"] if baseline["value"] else math.nan,
        "verdict": _verdict(lower, upper, direction),
        "compared": compared,
        "flag": "; ".join(flags),
    }


def _paired_interval(store: Store, baseline: pd.Series, row: pd.Series) -> tuple[float, float] | None:
    if row["kind"] != "task" or baseline["n"] != row["n"]:
        return None
    both = stored.paired_items(store, int(baseline["cell"]), int(row["cell"]), row["metric"])
    explains = len(both) == row["n"] and all(
        math.isclose(both[side].mean(), value["value"], rel_tol=1e-6, abs_tol=1e-9)
        for side, value in (("a", baseline), ("b", row))
    )
    if not explains:
        return None
    found = paired_bootstrap_difference(both["a"].tolist(), both["b"].tolist(), int(row["seed"]))
    return found.lower, found.upper


def _independent_interval(baseline: pd.Series, row: pd.Series) -> tuple[float, float]:
    """MOVER's interval of a difference from the two measurements' own intervals; NaN without them."""
    delta = row["value"] - baseline["value"]
    below = math.hypot(row["value"] - row["lower"], baseline["upper"] - baseline["value"])
    above = math.hypot(row["upper"] - row["value"], baseline["value"] - baseline["lower"])
    return delta - below, delta + above


def _verdict(lower: float, upper: float, direction: str | None) -> str:
    if math.isnan(lower) or math.isnan(upper) or direction is None:
        return ""
    if lower == upper == 0:
        return "equal"
    if lower <= 0 <= upper:
        return "no clear difference"
    return "better" if (upper < 0) == (direction == "lower") else "worse"


def option_table(frame: pd.DataFrame, variants: Sequence[int]) -> pd.DataFrame:
    """The options of variants side by side: one row an option, one column a variant, as text."""
    about = frame.drop_duplicates("variant").set_index("variant")
    table: dict[str, dict[str, str]] = {}
    for variant in variants:
        row = about.loc[variant]
        steps = [row["options"]] if isinstance(row["options"], Mapping) else row["options"]
        column = {name: str(row[name]) for name in ("model", "method", "family", "dtype", "device_name")}
        for number, options in enumerate(steps, start=1):
            prefix = f"step {number}: " if len(steps) > 1 else ""
            column |= {f"{prefix}{name}": str(value) for name, value in options.items()}
        table[row["name"]] = column | {"marks": row["marks"]}
    return pd.DataFrame(table, dtype=object).fillna("")


def failures(store: Store, sweep: int | Literal["last"] | None = None) -> pd.DataFrame:
    """The cells that are not ok: first those that should have been, then the newest first.

    The columns of `harness.store.queries.failures`, and ``place`` as in `load`.
    """
    frame = stored.failures(store, sweep=sweep)
    place = frame["task"].where(frame["task"].notna(), frame["scenario"])
    frame["place"] = place.where(place.notna(), frame["kind"]).astype(object)
    frame["started_at"] = frame["started_at"].str.slice(0, 19).str.replace("T", " ").astype(object)
    expected = [not Status(status).is_failure for status in frame["status"]]
    order = frame.assign(expected=expected).sort_values(
        ["expected", "cell"], ascending=[True, False], kind="stable"
    )
    return order.drop(columns="expected").reset_index(drop=True)
