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

from harness.errors import HarnessError
from harness.store import queries as stored
from harness.store.store import Store

from . import queries
from .queries import Filters, Stamp

__all__ = [
    "ask_filters",
    "ask_sweep",
    "choose_many",
    "choose_one",
    "how_to_fill",
    "opened",
    "records",
]

ENVIRONMENT = "HARNESS_DB"
NEWEST = "newest of each cell"

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
