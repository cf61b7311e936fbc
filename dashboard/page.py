"""What all pages share: the store, the filters in the address, and text that stays text.

Whatever comes from a store (names, reasons, logs) was written by others: it is only ever shown by
widgets that draw plain text (tables, choices, `st.text`, `st.code`), never by those that read
Markdown; charts, which read some HTML, escape it.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import streamlit as st

from harness.errors import HarnessError
from harness.store.store import Store

from . import kept, queries
from .boards import badge
from .queries import Filters

__all__ = [
    "already",
    "ask_filters",
    "ask_flag",
    "ask_place",
    "ask_sweep",
    "ask_text",
    "choose_many",
    "choose_one",
    "how_to_fill",
    "opened",
]

ENVIRONMENT = "HARNESS_DB"
NEWEST = "newest of each cell"

_FILL = "harness sweep --methods gptq,smoothquant"
_SEARCH = "Words that are all in a variant's method, model, family or device."
_METHODS = "A method without options also means every setting of it."
_TASKS = "Which tasks' scores are shown; timings stay."
_STATUSES = "Variants that have a cell with such a status, whole."


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
    chosen = choose_one(
        "Results of",
        [NEWEST, *map(str, queries.sweep_ids(store))],
        "sweep",
        st.sidebar,
        format_func=lambda each: each if each == NEWEST else f"sweep {each}",
    )
    return None if chosen in (None, NEWEST) else int(chosen)


# --- choices, kept in the address ---------------------------------------------------------------


def ask_filters(store: Store, sweep: int | None) -> Filters:
    """The filters in the side bar; they hold for every page and are part of the address.

    A page ends here where the store, or the sweep, has nothing to show.
    """
    if queries.is_empty(store, sweep):
        if sweep is None:
            how_to_fill("The store has no results yet.")
        else:
            st.info("This sweep has no results yet.")
        st.stop()
    offered = kept.options(store, sweep)

    def ask(label: str, options: Sequence[str], key: str, **widget: Any) -> tuple[str, ...]:
        return tuple(choose_many(label, options, key, st.sidebar, **widget))

    filters = Filters(
        search=ask_text("Search", "q", st.sidebar, help=_SEARCH, placeholder="gptq llama"),
        models=ask("Models", offered.models, "model"),
        methods=ask("Methods", offered.methods, "method", help=_METHODS),
        families=ask("Families", offered.families, "family"),
        devices=ask("Devices", offered.devices, "device"),
        tasks=ask("Tasks", offered.tasks, "task", help=_TASKS),
        statuses=ask("Status", offered.statuses, "status", help=_STATUSES, format_func=badge),
    )
    st.sidebar.button("Refresh", help="Read the store again.", width="stretch")
    return filters


def ask_text(label: str, key: str, where: Any = st, **widget: Any) -> str:
    """A text whose state is in the address as ``key=...``."""
    state = f"choice_{key}"
    if state not in st.session_state:
        st.session_state[state] = next(iter(_remembered(key)), "")
    text: str = where.text_input(label, key=state, max_chars=200, **widget)
    _remember(key, [text] if text else [], [])
    return text


def ask_flag(label: str, key: str, where: Any = st, **widget: Any) -> bool:
    """A switch whose state is in the address as ``key=1``; off where the reader did not turn it on."""
    state = f"choice_{key}"
    if state not in st.session_state:
        st.session_state[state] = _remembered(key) == ["1"]
    chosen: bool = where.toggle(label, key=state, **widget)
    _remember(key, ["1"] if chosen else [], [])
    return chosen


def ask_place(total: int, size: int, about: Hashable, where: Any = st, key: str = "page") -> int:
    """Which page of a long list; returns how many rows are on the pages before.

    Args:
        about: what the list depends on; where that has changed the list begins anew.
    """
    pages = [str(number + 1) for number in range(-(-total // size) or 1)]
    if st.session_state.setdefault(f"about_{key}", about) != about:
        st.session_state[f"about_{key}"] = about
        st.session_state[f"choice_{key}"] = pages[0]
    chosen = choose_one("Page", pages, key, where, format_func=lambda each: f"{each} of {len(pages)}")
    return (int(chosen or 1) - 1) * size


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


def already(key: str) -> list[str]:
    """What is chosen under a key, before its widget is drawn."""
    state = f"choice_{key}"
    return list(st.session_state[state]) if state in st.session_state else _remembered(key)


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
