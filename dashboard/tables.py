"""Tables: frames of `queries` in units and words for people, drawn as plain text and numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from harness.display import scale

from .charts import format_value, reading

__all__ = ["delta_table", "overview_table", "show_table"]

_ROW_PX, _HEADER_PX, _ROWS_SHOWN = 35, 38, 20
_STYLED_CELLS = 200_000  # pandas refuses to style more than 262,144
_PINNED = ("model", "method", "variant")
_WIDTHS_PX = {"marks": 100, "verdict": 140, "compared": 110, "reason": 420}
_OPTIONAL = ("marks", "caution")  # columns that are left out where nothing is in them


def show_table(table: pd.DataFrame) -> None:
    """A sortable table, as high as it needs; its cells are drawn as plain text and numbers."""
    height = _HEADER_PX + _ROW_PX * min(max(len(table), 1), _ROWS_SHOWN)
    blank = [name for name in _OPTIONAL if name in table and not table[name].astype(bool).any()]
    shown = table.drop(columns=blank)
    numbers = shown.select_dtypes("float").columns
    pinned = {name: {"pinned": True} for name in _PINNED if name in shown}
    widths = {name: {"width": width} for name, width in _WIDTHS_PX.items() if name in shown}
    drawn: Any = shown
    if shown.size <= _STYLED_CELLS:  # a styled number is drawn as text and still sorted as a number
        drawn = shown.style.format(na_rep="–")
        drawn = drawn.format(format_value, subset=list(numbers), na_rep="–")
    st.dataframe(
        drawn,
        hide_index=True,
        width="stretch",
        height=height,
        column_config={**pinned, **widths},
    )


def overview_table(table: pd.DataFrame, about: pd.DataFrame) -> pd.DataFrame:
    """`queries.overview` in units that are easy to read, with headings for people.

    Args:
        about: `queries.columns_of`, for the units.
    """
    units = dict(zip(about["column"], about["unit"], strict=True))
    shown = table.rename(columns={"knobs": "options", "device_name": "device"})
    for column in [name for name in table.columns if name in units]:
        # The middle value decides the unit: one huge model must not make all others 0.
        factor, unit = scale(units[column], [table[column].abs().median()])
        shown[column] = table[column] * factor
        shown = shown.rename(columns={column: f"{column} [{unit}]" if unit else column})
    return shown


def _difference(row: Any, factor: float) -> str:
    if row.lower == row.upper:
        return format_value(row.delta * factor)
    return reading(row.delta * factor, row.lower * factor, row.upper * factor)


def delta_table(deltas: pd.DataFrame) -> pd.DataFrame:
    """`queries.deltas` as text and numbers for people."""
    rows = []
    for row in deltas.itertuples():
        factor, unit = scale(row.unit, [row.baseline, row.value])
        # A difference of percentages is in percentage points, not in percent.
        step = "points" if unit == "%" else unit
        rows.append(
            {
                "variant": row.name,
                "metric": row.column,
                "verdict": row.verdict,
                "difference [95 %]": f"{_difference(row, factor)} {step}".strip(),
                "value / baseline": row.ratio,
                "baseline": f"{format_value(row.baseline * factor)} {unit}".strip(),
                "value": f"{format_value(row.value * factor)} {unit}".strip(),
                "compared": row.compared,
                "marks": row.marks,
                "caution": row.flag,
            }
        )
    return pd.DataFrame(rows)
