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
    "ask_filters",
    "ask_flag",
    "ask_place",
    "ask_sweep",
    "ask_text",
    "choose_many",
    "choose_one",
    "chosen_before",
    "how_to_fill",
    "opened",
]

ENVIRONMENT = "HARNESS_DB"
NEWEST = "newest of each cell"

_FILL = "harness sweep --methods gptq,smoothquant"
_LONGEST = 200  # of a text that is searched for
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
        st.session_state[state] = next(iter(chosen_before(key) or ()), "")[:_LONGEST]
    text: str = where.text_input(label, key=state, max_chars=_LONGEST, **widget)
    chosen = [text] if text else []
    _remember(key, chosen, chosen, [])
    return text


def ask_flag(label: str, key: str, where: Any = st, **widget: Any) -> bool:
    """A switch whose state is in the address as ``key=1``; off where the reader did not turn it on."""
    state = f"choice_{key}"
    if state not in st.session_state:
        st.session_state[state] = chosen_before(key) == ["1"]
    chosen: bool = where.toggle(label, key=state, **widget)
    told = ["1"] if chosen else []
    _remember(key, told, told, [])
    return chosen


def ask_place(total: int, size: int, about: Hashable, where: Any = st, key: str = "page") -> int:
    """Which page of a long list; returns how many rows are on the pages before.

    Args:
        about: what the list depends on; where that has changed the list begins anew.
    """
    pages = [str(number + 1) for number in range(-(-total // size) or 1)]
    if st.session_state.setdefault(f"about_{key}", about) != about:
        st.session_state[f"about_{key}"] = about
        _forget(key)
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
    wanted = chosen_before(key)

    def offered(names: Sequence[str]) -> list[str]:
        # An address can hold anything, and more than may be chosen.
        return [each for each in dict.fromkeys(names) if each in options][: widget.get("max_selections")]

    at_first = offered(default)
    shown = at_first if wanted is None else offered(wanted)
    if wanted and not shown:  # nothing of it is offered now; the reader did not empty the list
        shown = at_first
    _remember(key, wanted, shown, at_first)
    state = f"choice_{key}"
    st.session_state[state] = shown
    chosen: list[str] = where.multiselect(
        label, options, key=state, on_change=_note_choice, args=(key,), **widget
    )
    return chosen


def choose_one(label: str, options: Sequence[str], key: str, where: Any = st, **widget: Any) -> str | None:
    """A single choice whose state is in the address as ``key=...``; None where there is no option.

    The first option is what is chosen where the reader chose nothing.
    """
    if not options:
        return None
    wanted = chosen_before(key)
    shown = next((each for each in wanted or () if each in options), options[0])
    _remember(key, wanted, [shown], [options[0]])
    state = f"choice_{key}"
    st.session_state[state] = shown
    chosen: str = where.selectbox(label, options, key=state, on_change=_note_choice, args=(key,), **widget)
    return chosen


def chosen_before(key: str) -> list[str] | None:
    """What the reader chose under a key, known before its widget is drawn; None: the default holds."""
    # The address is emptied when another page is opened, so choices are kept in the session too.
    if f"choice_{key}" not in st.session_state and key in st.query_params:
        return [each for each in st.query_params.get_all(key) if each]
    wanted: list[str] | None = st.session_state.get(f"kept_{key}")
    return wanted


def _note_choice(key: str) -> None:
    """Called by Streamlit where the reader changed a choice, and only there.

    What a page shows is no choice of the reader's: defaults follow the filters, and a filter hides options.
    Taken for one, it would stay in the address when the filter is taken back.
    """
    chosen = st.session_state[f"choice_{key}"]
    wanted = [chosen] if isinstance(chosen, str) else list(chosen)
    st.session_state[f"kept_{key}"] = None if wanted == st.session_state[f"default_{key}"] else wanted


def _forget(key: str) -> None:
    st.session_state[f"kept_{key}"] = None
    if key in st.query_params:
        del st.query_params[key]


def _remember(key: str, wanted: list[str] | None, shown: list[str], default: list[str]) -> None:
    """Keep a choice in the session; what is shown is in the address where it differs from the default."""
    st.session_state[f"kept_{key}"] = wanted
    st.session_state[f"default_{key}"] = default
    if shown != default:
        st.query_params[key] = shown or ""  # a list that the reader emptied: `key=`
    elif key in st.query_params:
        del st.query_params[key]
