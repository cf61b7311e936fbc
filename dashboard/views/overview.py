"""All variants in one table, and each against its baseline."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from harness.store.store import Store

from .. import page, queries, tables

__all__ = ["render"]


def render() -> None:
    """Draw the page."""
    st.title("Overview")
    with page.opened() as store:
        frame = page.records(store, page.ask_sweep(store))
        rows = queries.named(queries.filtered(frame, page.ask_filters(frame)))
        if rows.empty:
            st.info("No variant passes the filters.")
            return
        cells = rows.drop_duplicates("cell")
        figures = st.columns(4)
        figures[0].metric("Variants", cells["variant"].nunique())
        figures[1].metric("Cells", len(cells))
        figures[2].metric("ok", int((cells["status"] == "ok").sum()))
        figures[3].metric("not ok", int((cells["status"] != "ok").sum()))
        about = queries.columns_of(rows)
        names = about["column"].tolist()
        chosen = page.choose_many("Columns", names, "column", default=queries.leading_columns(about))
        table = tables.overview_table(queries.overview(rows, chosen), about)
        tables.show_table(table, "variants")
        _draw_deltas(store, frame, rows, chosen)


def _draw_deltas(store: Store, frame: pd.DataFrame, rows: pd.DataFrame, chosen: list[str]) -> None:
    st.subheader("Against the baseline")
    wanted = set(rows["variant"])
    # The baselines take part even where a filter hides them.
    pairs = {variant: baseline for variant, baseline in queries.pairs_of(frame).items() if variant in wanted}
    names = rows.drop_duplicates("variant").set_index("variant")["name"]
    compared = queries.deltas(store, frame, chosen, pairs)
    compared["name"] = compared["variant"].map(names)
    if compared.empty:
        st.info("There is no baseline with these figures; `harness sweep` measures one by itself.")
        return
    st.caption(
        "Differences come with 95 % intervals. *Item by item*: both variants answered the same items, "
        "and the interval is a paired bootstrap. *By intervals*: the two intervals are combined as if "
        "the measurements were independent."
    )
    tables.show_table(tables.delta_table(compared), "against the baseline")
