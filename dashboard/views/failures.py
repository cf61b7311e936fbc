"""The cells that did not work, why, and what the worker last said."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from .. import page, queries

__all__ = ["render"]


def render() -> None:
    """Draw the page."""
    st.title("Failures")
    with page.opened() as store:
        frame = page.records(store)
        filters = page.ask_filters(frame)
        failed = queries.failures(store)
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
        page.show_table(failed[shown])
        _draw_details(failed)


def _draw_details(failed: pd.DataFrame) -> None:
    st.subheader("Details")
    labels = {
        f"cell {row.cell}: {row.status} · {row.model} · {row.method} · {row.place}": row
        for row in failed.itertuples()
    }
    chosen = page.choose_one("Cell", list(labels), "cell")
    row = labels[chosen]
    st.text(row.reason or "No reason was given.")
    for title, content in (("Traceback", row.traceback), ("End of the log", row.log_tail)):
        st.markdown(f"**{title}**")
        if content:
            st.code(content, language=None, wrap_lines=True)
        else:
            st.text("There is none.")
