"""A few variants side by side: every figure with its interval, options, and what was changed."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import streamlit as st

from harness.store import queries as stored
from harness.store.store import Store

from .. import charts, figures, page, queries, tables

__all__ = ["render"]

_FEWEST, _MOST = 2, 6


def render() -> None:
    """Draw the page."""
    st.title("Compare")
    with page.opened() as store:
        frame = page.records(store, page.ask_sweep(store))
        rows = queries.filtered(frame, page.ask_filters(frame))
        names = rows.drop_duplicates("variant").set_index("variant")["name"]
        ids = page.choose_many(
            f"Variants ({_FEWEST} to {_MOST}); the first is what the others are compared with",
            [str(variant) for variant in names.index],
            "variant",
            default=[str(variant) for variant in _first_choice(rows)],
            max_selections=_MOST,
            format_func=lambda variant: names[int(variant)],
        )
        ids = [int(variant) for variant in ids]
        if len(ids) < _FEWEST:
            st.info(f"Choose at least {_FEWEST} variants.")
            return
        chosen = queries.newest(rows[rows["variant"].isin(ids)])
        about = queries.columns_of(chosen)
        shared = [
            column
            for column in about["column"]
            if chosen.loc[chosen["column"] == column, "variant"].nunique() >= _FEWEST
        ]
        default = queries.leading_columns(about[about["column"].isin(shared)])
        columns = page.choose_many("Figures", shared, "figure", default=default)
        # Where all are of one model, its name need not be repeated.
        chosen = queries.named(chosen)
        _draw_charts(chosen, columns, _in_order(chosen, ids))
        _draw_tables(store, queries.named(rows[rows["variant"].isin(ids)]), ids, columns)


def _first_choice(rows: pd.DataFrame) -> list[int]:
    """The baseline with the most companions, and those of them with the most figures."""
    pairs = queries.pairs_of(rows)
    if not pairs:
        return [int(variant) for variant in rows["variant"].unique()[:_FEWEST]]
    baseline = Counter(pairs.values()).most_common(1)[0][0]
    figures = queries.newest(rows)["variant"].value_counts()
    others = [each for each, paired in pairs.items() if paired == baseline and each in figures]
    others.sort(key=lambda variant: -figures[variant])
    return [baseline, *others[:3]]


def _in_order(rows: pd.DataFrame, ids: list[int]) -> list[str]:
    names = rows.drop_duplicates("variant").set_index("variant")["name"]
    return [names[variant] for variant in ids if variant in names]


def _draw_charts(chosen: pd.DataFrame, columns: list[str], names: list[str]) -> None:
    places = st.columns(2)
    for number, column in enumerate(columns):
        figure = charts.comparison(chosen[chosen["column"] == column], names)
        figures.show_figure(figure, column, places[number % 2])


def _draw_tables(store: Store, rows: pd.DataFrame, ids: list[int], columns: list[str]) -> None:
    st.subheader("Against the first")
    pairs = dict.fromkeys(ids[1:], ids[0])
    compared = queries.deltas(store, rows, columns, pairs)
    if compared.empty:
        st.info("The first variant has none of these figures.")
    else:
        tables.show_table(tables.delta_table(compared))
    st.subheader("Options")
    tables.show_table(queries.option_table(rows, ids), "options", index=True)
    st.subheader("What the transforms changed")
    variants = stored.variants(store).set_index("variant").loc[ids].reset_index()
    tables.show_table(
        pd.DataFrame(
            {
                "variant": _in_order(rows, ids),
                "modules": variants["modules"],
                "changed": variants["modules_changed"],
                "MiB before": variants["bytes_before"] / 2**20,
                "MiB after": variants["bytes_after"] / 2**20,
                "after / before": variants["bytes_after"] / variants["bytes_before"],
                "simulated": [
                    {True: "yes", False: "no"}.get(simulated, "not known")
                    for simulated in variants["simulated"]
                ],
            }
        )
    )
