"""Quality against cost, with the variants that nothing beats."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from .. import charts, figures, page, queries, tables

__all__ = ["render"]


def _models(rows: pd.DataFrame) -> list[str]:
    """Those with quality and cost first."""
    kinds = rows[rows["column"].notna()].groupby("model")["kind"].agg(set)
    return sorted(kinds.index, key=lambda model: (not {"task", "scenario"} <= kinds[model], model))


def render() -> None:
    """Draw the page."""
    st.title("Pareto")
    with page.opened() as store:
        frame = page.records(store, page.ask_sweep(store))
        rows = queries.filtered(frame, page.ask_filters(frame))
        # A front over several models would only say that small models are small.
        model = page.choose_one("Model", _models(rows), "on")
        rows = queries.named(rows[rows["model"] == model])
        quality = queries.columns_of(rows, ["task"]).set_index("column")
        cost = queries.columns_of(rows, ["scenario", "transform"]).set_index("column")
        quality = quality[quality["direction"].notna()]
        cost = cost[cost["direction"].notna()]
        if quality.empty or cost.empty:
            st.info(
                "A front needs a quality and a cost: a sweep with `--tasks` and with timed shapes. "
                "Models with random weights have no quality."
            )
            return
        left, middle, right = st.columns([4, 4, 1], vertical_alignment="bottom")
        y = page.choose_one("Quality", quality.index.tolist(), "quality", left)
        x = page.choose_one("Cost", cost.index.tolist(), "cost", middle)
        log_x = right.toggle("log", key="log_x", help="Logarithmic cost axis")
        points = queries.points(rows, x, y)
        if points.empty:
            st.info("No variant has both figures.")
            return
        figure = charts.pareto(
            points,
            x_name=x, x_unit=cost.unit[x], x_better=cost.direction[x],
            y_name=y, y_unit=quality.unit[y], y_better=quality.direction[y],
            log_x=log_x,
        )  # fmt: skip
        figures.show_figure(figure, f"{y} {x}")
        if points["marks"].astype(bool).any():
            st.caption(
                "Hollow: *simulated*, the arithmetic of the method without a kernel that makes it "
                "fast or small; *synthetic*, random weights."
            )
        st.subheader("On the front")
        front = charts.pareto_front(points, cost.direction[x], quality.direction[y])
        best = points[front].sort_values("x", ascending=cost.direction[x] == "lower")
        table = queries.overview(rows, [x, y]).loc[best["variant"]]
        tables.show_table(tables.overview_table(table, queries.columns_of(rows)))
