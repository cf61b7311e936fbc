"""The leaderboard and its differences, in units and words for people. Pure: frames in, frames out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.display import scale

from .charts import format_value, reading
from .queries import Column

__all__ = ["ARROWS", "HOW_COMPARED", "Board", "badge", "board", "difference_table", "value_table"]

ARROWS = {"lower": "↓", "higher": "↑"}
"""Which way is good, beside the name of a figure."""

_BADGES = {
    "ok": "✓",
    "not_applicable": "–",
    "no_effect": "∅",
    "failed": "✕",
    "oom": "✕",
    "timeout": "⧖",
    "crashed": "✕",
    "skipped": "↷",
}
_SIGNS = {"better": "▲", "worse": "▼", "equal": "=", "no clear difference": "≈"}
HOW_COMPARED = (
    "Times and sizes: the variant over the first, scores: the difference, with 95 % intervals. *items*: both "
    "answered the same items (McNemar's test, or sign flips). *paired*: rounds timed in turn in one process. "
    "*control*: in units of a fixed workload timed beside each. *intervals*: the two intervals combined as "
    "if independent, which is cautious. ▲ better, ▼ worse, ≈ no clear difference, which is "
    "not equality."
)
"""What a table of differences rests on, for those who read it."""


def badge(status: str) -> str:
    """A status as a symbol and a word, so that colour is never needed.

    >>> badge("ok"), badge("oom")
    ('✓ ok', '✕ oom')
    """
    return f"{_BADGES[status]} {status}" if status in _BADGES else status


@dataclass(frozen=True)
class Board:
    """A table for people; `spread` and `course` name its columns of small charts."""

    table: pd.DataFrame
    spread: str | None = None
    course: str | None = None


def board(
    about: pd.DataFrame,
    ended: pd.DataFrame,
    values: pd.DataFrame,
    columns: Sequence[Column],
    *,
    first: int = 0,
    differences: pd.DataFrame | None = None,
    spreads: Mapping[int, Sequence[int]] | None = None,
    histories: Mapping[int, Sequence[float]] | None = None,
) -> Board:
    """One row a variant, in the order of `about`.

    Args:
        about: `queries.described`.
        ended: `queries.how_cells_ended`.
        values: `queries.values`, in the stored units.
        differences: `queries.differences` of the one column that the board is about.
        spreads: the raw readings of that column in bins, by variant.
        histories: all values of that column, by variant; drawn where any has two.
    """
    ids = about["variant"].tolist()
    statuses = _statuses(ended[ended["variant"].isin(ids)])
    table = pd.DataFrame({"#": range(first + 1, first + 1 + len(ids)), "method": about["method"].tolist()})
    table["model"] = about["model"].tolist()
    table["cells"] = [statuses.get(variant, "") for variant in ids]
    table["marks"] = about["marks"].tolist()
    # What the board is about comes first, beside what it is compared with.
    ranked = differences["column"].iloc[0] if differences is not None and len(differences) else ""
    for column in sorted(columns, key=lambda column: column.name != ranked):
        found = values[values["column"] == column.name].set_index("variant")["value"]
        heading, shown = _scaled(column, found.reindex(ids))
        table[heading] = shown.tolist()
        if column.name == ranked:
            _put_differences(table, differences.set_index("variant"), ids)
    spread = course = None
    if spreads:
        spread = "readings"
        table[spread] = pd.Series([list(spreads.get(variant, [])) for variant in ids], dtype=object)
    if histories and any(len(each) > 1 for each in histories.values()):
        course = "history"
        table[course] = pd.Series([list(histories.get(variant, [])) for variant in ids], dtype=object)
    table["options"] = about["knobs"].tolist()
    for name in ("family", "seed", "dtype"):
        table[name] = about[name].tolist()
    table["device"] = about["device_name"].tolist()
    return Board(table, spread, course)


def _put_differences(table: pd.DataFrame, of: pd.DataFrame, ids: Sequence[int]) -> None:
    rows = [of.loc[variant] if variant in of.index else None for variant in ids]
    table["against the baseline"] = ["" if row is None else _difference(row) for row in rows]
    table["verdict"] = ["" if row is None else verdict(row) for row in rows]
    if of["p"].notna().any():
        table["p"] = [math.nan if row is None else row["p"] for row in rows]
    table["caution"] = ["" if row is None else row["caution"] for row in rows]


def difference_table(differences: pd.DataFrame, names: Mapping[int, str]) -> pd.DataFrame:
    """`queries.differences` as text and numbers for people.

    Args:
        names: of the variants.
    """
    rows = []
    for row in differences.to_dict("records"):
        factor, unit = scale(row["unit"], [row["baseline"], row["value"]])
        rows.append(
            {
                "variant": names[row["variant"]],
                "figure": row["column"] + _arrow(row["direction"]),
                "verdict": verdict(row),
                "difference [95 %]": _difference(row),
                "p": row["p"],
                "test": row["test"],
                "detectable": _step(row, row["detectable"]),
                "flips [%]": math.nan if row["flips"] is None else row["flips"] * 100,
                "items": row["n"],
                "first": f"{format_value(row['baseline'] * factor)} {unit}".strip(),
                "value": f"{format_value(row['value'] * factor)} {unit}".strip(),
                "rests on": row["basis"],
                "caution": row["caution"],
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"flips [%]": "float64"}) if rows else table


def value_table(values: pd.DataFrame, columns: Sequence[Column], about: pd.DataFrame) -> pd.DataFrame:
    """Every figure of a few variants: one row a figure, one column a variant, with intervals, as text.

    Args:
        values: `queries.values`, in the stored units.
        about: `queries.described`.
    """
    by_place = {
        (row["variant"], row["column"]): row for row in values[values["value"].notna()].to_dict("records")
    }
    rows = []
    for column in columns:
        found = [by_place.get((variant, column.name)) for variant in about["variant"]]
        factor, unit = scale(column.unit, [None if row is None else row["value"] for row in found])
        row = {"figure": column.name + _arrow(column.direction), "unit": unit}
        for name, each in zip(about["name"], found, strict=True):
            row[name] = (
                "–"
                if each is None
                else reading(each["value"] * factor, each["lower"] * factor, each["upper"] * factor)
            )
        rows.append(row)
    return pd.DataFrame(rows, columns=["figure", "unit", *about["name"]])


def verdict(row: Any) -> str:
    """A verdict with a sign, so that columns of them can be scanned."""
    words = str(row["verdict"])
    if words in _SIGNS:
        return f"{_SIGNS[words]} {words}"
    if words:  # "1.7x faster"
        good = words.endswith(("faster", "smaller", "less"))
        return f"{'▲' if good else '▼'} {words}"
    return ""


def _statuses(ended: pd.DataFrame) -> dict[int, str]:
    found: dict[int, list[str]] = {}
    for variant, status, count in ended[["variant", "status", "cells"]].itertuples(index=False, name=None):
        found.setdefault(variant, []).append(f"{_BADGES.get(status, '')} {count} {status}".strip())
    return {variant: ", ".join(said) for variant, said in found.items()}


def _scaled(column: Column, values: pd.Series) -> tuple[str, pd.Series]:
    # The middle value decides the unit: one huge model must not make all others 0.
    factor, unit = scale(column.unit, [values.abs().median()])
    heading = f"{column.name} [{unit}]" if unit else column.name
    return heading, values * factor


def _arrow(direction: str | None) -> str:
    return f" {ARROWS[direction]}" if direction in ARROWS else ""


def _difference(row: Any) -> str:
    if row["is_ratio"] and row["lower"] == row["upper"]:  # counted
        return f"{format_value(row['ratio'])}x"
    if row["is_ratio"]:
        return f"{reading(row['ratio'], row['lower'], row['upper'])}x"
    factor, _ = scale(row["unit"], [row["baseline"], row["value"]])
    low, high = row["lower"] * factor, row["upper"] * factor
    return _step(
        row, row["difference"], f" [{format_value(low)}, {format_value(high)}]" if low == low else ""
    )


def _step(row: Any, difference: float | None, interval: str = "") -> str:
    if difference is None or math.isnan(difference):
        return ""
    factor, unit = scale(row["unit"], [row["baseline"], row["value"]])
    # A difference of percentages is in percentage points, not in percent.
    step = "points" if unit == "%" else unit
    return f"{format_value(difference * factor)}{interval} {step}".strip()
