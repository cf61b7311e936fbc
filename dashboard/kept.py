"""Answers of the store that all pages need, kept until something is added to it."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from harness.store.store import Store

from . import queries
from .queries import Column, Options, Stamp

__all__ = ["columns", "how_cells_ended", "options"]

# Streamlit leaves a parameter with an underscore out of the key; the label says which store it is.


def options(store: Store, sweep: int | None) -> Options:
    """`queries.options`."""
    return _options(store.label, queries.stamp(store), sweep, store)


def columns(store: Store, sweep: int | None) -> list[Column]:
    """`queries.columns`; the list is shared, so it must not be changed."""
    return _columns(store.label, queries.stamp(store), sweep, store)


def how_cells_ended(store: Store, sweep: int | None) -> pd.DataFrame:
    """`queries.how_cells_ended`; the frame is shared, so it must not be changed."""
    return _how_cells_ended(store.label, queries.stamp(store), sweep, store)


@st.cache_resource(show_spinner=False, max_entries=8)
def _options(label: str, at: Stamp, sweep: int | None, _store: Store) -> Options:
    return queries.options(_store, sweep)


@st.cache_resource(show_spinner=False, max_entries=8)
def _columns(label: str, at: Stamp, sweep: int | None, _store: Store) -> list[Column]:
    return queries.columns(_store, sweep)


@st.cache_resource(show_spinner=False, max_entries=8)
def _how_cells_ended(label: str, at: Stamp, sweep: int | None, _store: Store) -> pd.DataFrame:
    return queries.how_cells_ended(_store, sweep)
