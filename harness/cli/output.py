"""Rows as a table, JSON, CSV or markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import typer

from harness.untrusted import clean, spreadsheet_cell

__all__ = ["Format", "clean", "discard_output", "format_value", "print_rows", "say"]


class Format(StrEnum):
    """What `--format` takes."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


def say(text: str, *, err: bool = False) -> None:
    """Print one line that may hold what others wrote; on standard error nobody need be there to read it."""
    try:
        typer.echo(clean(text), err=err)
    except OSError:  # its terminal or pipe was closed
        if not err:
            raise


def discard_output() -> None:
    """Write to nowhere from here on: the reader of standard output is gone, which is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_rows(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], output: Format, *, title: str = ""
) -> None:
    """Print rows to standard output; JSON keeps every key and the types, the others the columns."""
    if output is Format.JSON:
        print(json.dumps([_json_row(row) for row in rows], indent=2, allow_nan=False))
    elif output is Format.CSV:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([spreadsheet_cell(column) for column in columns])
        for row in rows:
            writer.writerow([spreadsheet_cell(row.get(column)) for column in columns])
        print(buffer.getvalue(), end="")
    elif output is Format.MARKDOWN:
        from harness.reference_tables import markdown_table

        cells = [[clean(format_value(row.get(column))) for column in columns] for row in rows]
        print(markdown_table([clean(column) for column in columns], cells))
    else:
        _print_table(rows, columns, title)


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Without a terminal nothing is cut: a table in a log or a pipe must be whole.
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    table = Table(title=Text(clean(title)) if title else None, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        numeric = any(isinstance(row.get(column), (int, float)) for row in rows)
        table.add_column(
            Text(clean(column)), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric
        )
    for row in rows:
        table.add_row(*(Text(clean(format_value(row.get(column)))) for column in columns))
    console.print(table)


def format_value(value: Any) -> str:
    """A value for people: four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value.is_integer() and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, separators=(",", ":"))
    return str(value)


def _json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _json_value(value) for key, value in row.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _json_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(each) for each in value]
    if hasattr(value, "item"):  # numpy scalars
        return _json_value(value.item())
    return value
