"""Tables: frames of `queries` in units and words for people, drawn as plain text and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from harness.glossary import VALUES, explain, heading_of

from .buttons import table_buttons
from .charts import format_value

__all__ = ["column_settings", "show_table"]

_ROW_PX, _HEADER_PX, _ROWS_SHOWN = 35, 38, 20
_STYLED_CELLS = 200_000  # pandas refuses to style more than 262,144
_PINNED = ("model", "method", "variant")
_WIDTHS_PX = {"cells": 170, "marks": 100, "verdict": 140, "compared": 110, "reason": 420}
_OPTIONAL = ("marks", "caution")  # columns that are left out where nothing is in them


def show_table(
    table: pd.DataFrame,
    name: str = "",
    where: Any = st,
    *,
    index: bool = False,
    charts: Mapping[str, Any] | None = None,
) -> None:
    """A sortable table, as high as it needs, with its downloads; cells are drawn as plain text and numbers.

    A heading says the unit and which way is good; hovering over it says what the column means.

    Args:
        name: what the table shows, unique on its page; by default made of its first columns.
        where: a Streamlit container.
        index: whether the rows' names are shown.
        charts: columns of lists that are drawn small, each with one of Streamlit's chart columns.
    """
    blank = [column for column in _OPTIONAL if column in table and not table[column].astype(bool).any()]
    shown = table.drop(columns=blank)
    where.dataframe(
        _formatted(shown),
        hide_index=not index,
        width="stretch",
        height=_HEADER_PX + _ROW_PX * min(max(len(table), 1), _ROWS_SHOWN),
        placeholder="–",
        column_config={**column_settings(shown), **(charts or {})},
    )
    table_buttons(table, name or " ".join(str(column) for column in table.columns[:2]), where, index=index)


def column_settings(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """How each column is headed and explained, by its name."""
    settings = {}
    for column in table.columns:
        words = table[column] if column in VALUES or column in ("metric", "cells") else ()
        setting = {
            "label": f"{column} {heading_of(column).arrow}".strip(),
            "help": explain(column, words),
            "width": _WIDTHS_PX.get(column),
            "pinned": True if column in _PINNED else None,
        }
        settings[column] = {key: value for key, value in setting.items() if value is not None}
    return settings


def _formatted(table: pd.DataFrame) -> Any:
    """The table with numbers for people; a styled number is drawn as text and still sorted as a number."""
    if table.size > _STYLED_CELLS or not (table.index.is_unique and table.columns.is_unique):
        return table
    drawn = table.style.format(na_rep="–")
    numbers = list(table.select_dtypes("float").columns)
    return drawn.format(format_value, subset=numbers, na_rep="–")
