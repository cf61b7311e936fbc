"""The cells that did not work, why, and what the worker last said."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from .. import page, queries, tables

__all__ = ["render"]


def render() -> None:
    """Draw the page."""
    st.title("Failures")
    with page.opened() as store:
        sweep = page.ask_sweep(store)
        frame = page.records(store, sweep)
        filters = page.ask_filters(frame)
        failed = queries.failures(store, sweep)
        passed = queries.filtered(frame, filters)
        failed = failed[failed["cell"].isin(set(passed["cell"]))]
        if filters.statuses:
            failed = failed[failed["status"].isin(filters.statuses)]
        if failed.empty:
            st.success("Every cell is ok.")
            return
        st.write(
            "`failed`, `oom`, `timeout`, `crashed` and `no_effect` should have worked; "
            "`not_applicable` and `skipped` say why there is nothing to measure. "
            "`harness sweep --retry-failed` runs failures again."
        )
        counts = failed["status"].value_counts()
        for place, (status, count) in zip(st.columns(len(counts)), counts.items(), strict=True):
            place.metric(str(status), int(count))
        shown = ["status", "model", "method", "place", "reason", "seconds", "sweep", "started_at"]
        tables.show_table(failed[shown], "cells")
        _draw_details(failed)


def _label(row: Any) -> str:
    return f"{row.status} · {row.model} · {row.method} · {row.place} (cell {row.cell})"


def _draw_details(failed: pd.DataFrame) -> None:
    st.subheader("Details")
    rows = {str(row.cell): row for row in failed.itertuples()}
    chosen = page.choose_one("Cell", list(rows), "cell", format_func=lambda cell: _label(rows[cell]))
    row = rows[chosen]
    st.text(row.reason or "No reason was given.")
    for title, content in (("Traceback", row.traceback), ("End of the log", row.log_tail)):
        st.markdown(f"**{title}**")
        if content:
            st.code(content, language=None, wrap_lines=True)
        else:
            st.text("There is none.")
