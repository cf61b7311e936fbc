"""What a reader takes home: tables as CSV and JSON, figures as one HTML file. Pure.

Nothing here needs a network: a figure's file holds all of Plotly. Pictures (PNG, SVG) are made by the
browser.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from harness.untrusted import spreadsheet_cell

__all__ = ["csv_of", "file_stem", "html_of", "json_of"]

_LONGEST_STEM = 80


def csv_of(table: pd.DataFrame, *, index: bool = False) -> bytes:
    """All rows as CSV in UTF-8 with a byte-order mark, by which spreadsheets know it.

    Numbers are written in full; a text that a spreadsheet would run as a formula gets an apostrophe first.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    whole = table.reset_index() if index else table
    writer.writerow([spreadsheet_cell(str(name)) for name in whole.columns])
    for row in whole.itertuples(index=False, name=None):
        writer.writerow([spreadsheet_cell("" if _is_missing(value) else _plain(value)) for value in row])
    return buffer.getvalue().encode("utf-8-sig", "backslashreplace")


def json_of(table: pd.DataFrame, *, index: bool = False) -> bytes:
    """All rows as a JSON list of objects: types are kept, and what is missing is null."""
    whole = table.reset_index() if index else table
    names = [str(name) for name in whole.columns]
    rows = [
        {name: _json_value(value) for name, value in zip(names, row, strict=True)}
        for row in whole.itertuples(index=False, name=None)
    ]
    text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def html_of(figure: go.Figure, title: str) -> bytes:
    """The figure as one HTML file that still answers to the mouse and loads nothing."""
    whole = go.Figure(figure)
    whole.update_layout(template="plotly_white", width=None, autosize=True)
    options = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"filename": title}}
    page = whole.to_html(include_plotlyjs=True, include_mathjax=False, full_html=True, config=options)
    return page.encode("utf-8", "backslashreplace")


def file_stem(*parts: str) -> str:
    """A file name without its ending: only letters, digits, dots and hyphens, whatever the parts hold.

    >>> file_stem("pareto", "acc · hellaswag"), file_stem("../../etc", "=cmd")
    ('harness-pareto-acc-hellaswag', 'harness-etc-cmd')
    """
    words = re.findall(r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*", " ".join(parts))
    return "-".join(["harness", *words])[:_LONGEST_STEM].rstrip("-._")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _is_missing(value: Any) -> bool:
    return (
        value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))
    )


def _json_value(value: Any) -> Any:
    value = _plain(value)
    if _is_missing(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _json_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(each) for each in value]
    return str(value)  # a time
