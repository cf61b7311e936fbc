"""What all pages share: the store, the filters in the address, and text that stays text.

Whatever comes from a store (names, reasons, logs) was written by others: it is only ever shown by
widgets that draw plain text (tables, choices, `st.text`, `st.code`), never by those that read
Markdown; charts, which read some HTML, escape it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import streamlit as st

from harness.display import scale
from harness.errors import HarnessError
from harness.store import queries as stored
from harness.store.store import Store

from . import queries
from .charts import format_value, reading
from .queries import Filters, Stamp

__all__ = [
    "ask_filters",
    "ask_sweep",
    "choose_many",
    "choose_one",
    "delta_table",
    "how_to_fill",
    "opened",
    "overview_table",
    "records",
    "show_table",
]

ENVIRONMENT = "HARNESS_DB"
NEWEST = "newest of each cell"
_ROW_PX, _HEADER_PX, _ROWS_SHOWN = 35, 38, 20
_STYLED_CELLS = 200_000  # pandas refuses to style more than 262,144
_PINNED = ("model", "method", "variant")
_WIDTHS_PX = {"marks": 100, "verdict": 140, "compared": 110, "reason": 420}
_OPTIONAL = ("marks", "caution")  # columns that are left out where nothing is in them
_FILL = "harness sweep --methods gptq,smoothquant"


# --- the store --------------------------------------------------------------------------------


@contextmanager
def opened() -> Iterator[Store]:
    """The store of this server, read-only; a page ends here where there is nothing to show."""
    target = os.environ.get(ENVIRONMENT) or "results.db"
    try:
        store = Store.open_readonly(target)
    except HarnessError as error:
        how_to_fill("There are no results to show yet.", str(error))
        st.stop()
    with store:
        try:
            yield store
        except HarnessError as error:
            st.error("The results cannot be read.")
            st.text(str(error))
            st.stop()


def how_to_fill(headline: str, reason: str = "") -> None:
    """What to do about a store without results."""
    st.info(headline)
    if reason:
        st.text(reason)
    st.write("Fill the store with a sweep, then reload this page:")
    st.code(_FILL, language="bash")


def ask_sweep(store: Store) -> int | None:
    """The sweep that the reader chose; None for the newest of each cell."""
    sweeps = [str(sweep) for sweep in reversed(stored.sweeps(store)["sweep"].tolist())]
    chosen = choose_one(
        "Results of",
        [NEWEST, *sweeps],
        "sweep",
        st.sidebar,
        format_func=lambda each: each if each == NEWEST else f"sweep {each}",
    )
    return None if chosen in (None, NEWEST) else int(chosen)


def records(store: Store, sweep: int | None) -> pd.DataFrame:
    """The records of a sweep, or the current ones; a page ends here where there are none."""
    frame = _records(store.label, queries.stamp(store), sweep, store)
    if frame.empty:
        if sweep is None:
            how_to_fill("The store has no results yet.")
        else:
            st.info("This sweep has no results yet.")
        st.stop()
    return frame


@st.cache_data(show_spinner=False, max_entries=8)
def _records(label: str, at: Stamp, sweep: int | None, _store: Store) -> pd.DataFrame:
    # Kept until something is added; Streamlit leaves the parameter with an underscore out of the key.
    return queries.load(_store, sweep)


# --- choices, kept in the address ---------------------------------------------------------------


def ask_filters(frame: pd.DataFrame) -> Filters:
    """The filters in the side bar; they hold for every page and are part of the address."""

    def ask(label: str, column: str, key: str) -> tuple[str, ...]:
        options = sorted(str(value) for value in frame[column].dropna().unique())
        return tuple(choose_many(label, options, key, st.sidebar))

    with st.sidebar:
        filters = Filters(
            models=ask("Models", "model", "model"),
            methods=ask("Methods", "method", "method"),
            families=ask("Families", "family", "family"),
            devices=ask("Devices", "device_name", "device"),
            tasks=ask("Tasks", "task", "task"),
            statuses=ask("Status", "status", "status"),
        )
        st.button("Refresh", help="Read the store again.", width="stretch")
    return filters


def choose_many(
    label: str,
    options: Sequence[str],
    key: str,
    where: Any = st,
    *,
    default: Sequence[str] = (),
    **widget: Any,
) -> list[str]:
    """A multiple choice whose state is in the address as ``key=...&key=...``."""
    state = f"choice_{key}"
    if state not in st.session_state:
        st.session_state[state] = _remembered(key) or list(default)
    # What the store no longer offers cannot stay chosen.
    st.session_state[state] = [each for each in st.session_state[state] if each in options]
    chosen: list[str] = where.multiselect(label, options, key=state, **widget)
    _remember(key, chosen, list(default))
    return chosen


def choose_one(label: str, options: Sequence[str], key: str, where: Any = st, **widget: Any) -> str | None:
    """A single choice whose state is in the address as ``key=...``; None where there is no option.

    The first option is what is chosen where the reader chose nothing.
    """
    if not options:
        return None
    state = f"choice_{key}"
    wanted = st.session_state.get(state) or next(iter(_remembered(key)), None)
    st.session_state[state] = wanted if wanted in options else options[0]
    chosen: str = where.selectbox(label, options, key=state, **widget)
    _remember(key, [chosen], [options[0]])
    return chosen


def _remembered(key: str) -> list[str]:
    # The address is emptied when another page is opened, so choices are kept in the session too.
    if key in st.query_params:
        return st.query_params.get_all(key)
    return list(st.session_state.get(f"kept_{key}", []))


def _remember(key: str, chosen: list[str], default: list[str]) -> None:
    st.session_state[f"kept_{key}"] = chosen
    if chosen != default:
        st.query_params[key] = chosen
    elif key in st.query_params:
        del st.query_params[key]


# --- tables -----------------------------------------------------------------------------------


def show_table(table: pd.DataFrame) -> None:
    """A sortable table, as high as it needs; its cells are drawn as plain text and numbers."""
    height = _HEADER_PX + _ROW_PX * min(max(len(table), 1), _ROWS_SHOWN)
    blank = [name for name in _OPTIONAL if name in table and not table[name].astype(bool).any()]
    shown = table.drop(columns=blank)
    numbers = shown.select_dtypes("float").columns
    pinned = {name: {"pinned": True} for name in _PINNED if name in shown}
    widths = {name: {"width": width} for name, width in _WIDTHS_PX.items() if name in shown}
    drawn: Any = shown
    if shown.size <= _STYLED_CELLS:  # a styled number is drawn as text and still sorted as a number
        drawn = shown.style.format(na_rep="–")
        drawn = drawn.format(format_value, subset=list(numbers), na_rep="–")
    st.dataframe(
        drawn,
        hide_index=True,
        width="stretch",
        height=height,
        column_config={**pinned, **widths},
    )


def overview_table(table: pd.DataFrame, about: pd.DataFrame) -> pd.DataFrame:
    """`queries.overview` in units that are easy to read, with headings for people.

    Args:
        about: `queries.columns_of`, for the units.
    """
    units = dict(zip(about["column"], about["unit"], strict=True))
    shown = table.rename(columns={"knobs": "options", "device_name": "device"})
    for column in [name for name in table.columns if name in units]:
        # The middle value decides the unit: one huge model must not make all others 0.
        factor, unit = scale(units[column], [table[column].abs().median()])
        shown[column] = table[column] * factor
        shown = shown.rename(columns={column: f"{column} [{unit}]" if unit else column})
    return shown


def _difference(row: Any, factor: float) -> str:
    if row.lower == row.upper:
        return format_value(row.delta * factor)
    return reading(row.delta * factor, row.lower * factor, row.upper * factor)


def delta_table(deltas: pd.DataFrame) -> pd.DataFrame:
    """`queries.deltas` as text and numbers for people."""
    rows = []
    for row in deltas.itertuples():
        factor, unit = scale(row.unit, [row.baseline, row.value])
        # A difference of percentages is in percentage points, not in percent.
        step = "points" if unit == "%" else unit
        rows.append(
            {
                "variant": row.name,
                "metric": row.column,
                "verdict": row.verdict,
                "difference [95 %]": f"{_difference(row, factor)} {step}".strip(),
                "value / baseline": row.ratio,
                "baseline": f"{format_value(row.baseline * factor)} {unit}".strip(),
                "value": f"{format_value(row.value * factor)} {unit}".strip(),
                "compared": row.compared,
                "marks": row.marks,
                "caution": row.flag,
            }
        )
    return pd.DataFrame(rows)
