"""All variants as a leaderboard, each against its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from harness.glossary import explain
from harness.store.store import Store

from .. import kept, page, queries, tables
from ..boards import HOW_COMPARED, Board, board, difference_table
from ..queries import Column, Filters
from ..variant_names import marked_names

__all__ = ["render"]

_SIZES = ("25", "50", "100", "250")
_ATTRIBUTES = ("newest", "model", "method")
_ORDERS = ("best first", "worst first")


def render() -> None:
    """Draw the page."""
    st.title("Overview")
    with page.opened() as store:
        sweep = page.ask_sweep(store)
        filters = page.ask_filters(store, sweep)
        ids = queries.matching(store, filters, sweep)
        if not ids:
            st.info("No variant passes the filters.")
            return
        ended = kept.how_cells_ended(store, sweep)
        _draw_counts(ids, ended)
        offered = queries.of_models(kept.columns(store, sweep), filters.models, filters.tasks)
        by_name = {column.name: column for column in offered}
        names = page.choose_many("Columns", list(by_name), "column", default=queries.leading(offered))
        columns = [by_name[name] for name in names]
        order = _ask_order(names, by_name)
        shown, first = _page_of(store, filters, sweep, order, len(ids))
        about = queries.described(store, shown)
        _draw_board(store, about, columns, order.column, ended, sweep, first)
        if page.ask_flag(
            "Differences to the baseline in all columns",
            "all",
            help="One row a variant and column, for the variants on this page.",
        ):
            _draw_differences(store, about, columns, sweep)


def _draw_counts(ids: Sequence[int], ended: pd.DataFrame) -> None:
    mine = ended[ended["variant"].isin(set(ids))]
    total, ok = int(mine["cells"].sum()), int(mine.loc[mine["status"] == "ok", "cells"].sum())
    figures = st.columns(4)
    figures[0].metric("Variants", len(ids), help="A method on a model, with a seed, a type and a device.")
    figures[1].metric("Cells", total, help="What was asked of the variants: transform, shapes and tasks.")
    figures[2].metric("ok", ok)
    figures[3].metric("not ok", total - ok, help="Failed, or not applicable: the Sweep page says why.")


class _Order:
    """What the leaderboard is sorted by."""

    def __init__(self, name: str, column: Column | None, *, best_first: bool) -> None:
        self.name, self.column, self.best_first = name, column, best_first

    @property
    def descending(self) -> bool:
        if self.column is None:
            return (self.name == "newest") == self.best_first
        return (self.column.direction != "lower") == self.best_first


def _ask_order(names: Sequence[str], by_name: Mapping[str, Column]) -> _Order:
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    by = page.choose_one(
        "Ranked by",
        [*names, *_ATTRIBUTES],
        "by",
        left,
        help="The order of the whole list, and the figure that is compared with the baseline's.",
    )
    order = page.choose_one("Order", _ORDERS, "order", right)
    return _Order(str(by), by_name.get(str(by)), best_first=order == _ORDERS[0])


def _page_of(
    store: Store, filters: Filters, sweep: int | None, order: _Order, total: int
) -> tuple[list[int], int]:
    """The variants of the page that the reader is on, and how many come before."""
    left, right, _ = st.columns([1, 1, 2])
    size = int(page.choose_one("Rows on a page", _SIZES, "rows", left) or _SIZES[0])
    about = (filters, sweep, order.name, order.best_first, size)
    first = page.ask_place(total, size, about, right)
    by = order.column or order.name
    shown = queries.shown(store, filters, sweep, by=by, descending=order.descending, first=first, count=size)
    st.caption(
        f"{first + 1:,} to {first + len(shown):,} of {total:,} variants. ↓ lower is better, ↑ higher is "
        "better. A click on a heading sorts this page, *Ranked by* the whole list."
    )
    return shown, first


def _draw_board(
    store: Store,
    about: pd.DataFrame,
    columns: Sequence[Column],
    ranked: Column | None,
    ended: pd.DataFrame,
    sweep: int | None,
    first: int,
) -> None:
    ids = about["variant"].tolist()
    values = queries.values(store, columns, sweep, ids)
    compared: dict[str, Any] = {}
    if ranked is not None:
        mine = values[values["column"] == ranked.name]
        compared = {
            "differences": _differences(store, about, [ranked], sweep, mine),
            "spreads": queries.histograms(store, dict(zip(mine["variant"], mine["record"], strict=True))),
            "histories": queries.histories(store, ranked, ids),
        }
        if compared["differences"].empty:
            st.caption(
                "None of these has a baseline with this figure; `harness sweep` measures one by itself."
            )
    _show(board(about, ended, values, columns, first=first, **compared))


def _differences(
    store: Store, about: pd.DataFrame, columns: Sequence[Column], sweep: int | None, values: pd.DataFrame
) -> pd.DataFrame:
    # The baselines take part even where a filter hides them.
    pairs = queries.baselines(store, about, sweep)
    hidden = sorted(set(pairs.values()) - set(about["variant"]))
    if hidden:
        values = pd.concat([values, queries.values(store, columns, sweep, hidden)])
        about = pd.concat([about, queries.described(store, hidden)])
    return queries.differences(store, columns, values, pairs, about)


def _show(drawn: Board) -> None:
    charts: dict[str, Any] = {}
    if drawn.spread:
        charts[drawn.spread] = st.column_config.BarChartColumn(help=explain(drawn.spread), y_min=0)
    if drawn.course:
        charts[drawn.course] = st.column_config.LineChartColumn(help=explain(drawn.course))
    tables.show_table(drawn.table, "leaderboard", charts=charts)


def _draw_differences(
    store: Store, about: pd.DataFrame, columns: Sequence[Column], sweep: int | None
) -> None:
    st.subheader("Against the baseline")
    values = queries.values(store, columns, sweep, about["variant"].tolist())
    found = _differences(store, about, columns, sweep, values)
    if found.empty:
        st.info("There is no baseline with these figures; `harness sweep` measures one by itself.")
        return
    st.caption(HOW_COMPARED)
    tables.show_table(difference_table(found, marked_names(about)), "differences")
