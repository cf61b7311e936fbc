"""The cells that did not work, why, and what the worker last said."""

from __future__ import annotations

from typing import Any

import streamlit as st

from harness.store.store import Store

from .. import page, queries, tables
from ..boards import badge

__all__ = ["render"]

_ON_A_PAGE = 100


def render() -> None:
    """Draw the page."""
    st.title("Failures")
    with page.opened() as store:
        sweep = page.ask_sweep(store)
        filters = page.ask_filters(store, sweep)
        counts = queries.failures(store, filters, sweep, count=0).counts
        total = sum(counts.values())
        if not total:
            st.success("Every cell is ok.")
            return
        st.write(
            "`failed`, `oom`, `timeout`, `crashed` and `no_effect` should have worked; "
            "`not_applicable` and `skipped` say why there is nothing to measure. "
            "`harness sweep --retry-failed` runs failures again."
        )
        for place, (status, count) in zip(st.columns(len(counts)), counts.items(), strict=True):
            place.metric(badge(status), count)
        first = 0
        if total > _ON_A_PAGE:
            first = page.ask_place(total, _ON_A_PAGE, (filters, sweep), key="failures")
        rows = queries.failures(store, filters, sweep, first=first, count=_ON_A_PAGE).rows
        shown = ["status", "model", "method", "place", "reason", "seconds", "sweep", "started_at"]
        tables.show_table(rows[shown].assign(status=rows["status"].map(badge)), "failures")
        _draw_details(store, {str(row.cell): row for row in rows.itertuples()})


def _label(row: Any) -> str:
    return f"{row.status} · {row.model} · {row.method} · {row.place} (cell {row.cell})"


def _draw_details(store: Store, rows: dict[str, Any]) -> None:
    st.subheader("Details")
    chosen = page.choose_one("Cell", list(rows), "cell", format_func=lambda cell: _label(rows[cell]))
    said = queries.what_was_said(store, int(chosen or 0))
    st.text(said.reason or "No reason was given.")
    for title, content in (("Traceback", said.traceback), ("End of the log", said.log_tail)):
        st.markdown(f"**{title}**")
        if content:
            st.code(content, language=None, wrap_lines=True)
        else:
            st.text("There is none.")
