"""The downloads below tables and figures.

Files are made when they are asked for, so a page does not pay for them.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from .downloads import csv_of, file_stem, html_of, json_of

__all__ = ["figure_buttons", "picture_format", "stem_here", "table_buttons"]

_FORMATS = {"PNG": "png", "SVG": "svg"}
_CHOSEN = "picture_format"  # one choice for all figures of a session
_ICON = ":material/download:"


def stem_here(name: str) -> str:
    """A file name without its ending that tells the page and what of it."""
    page = urlsplit(st.context.url or "").path.rpartition("/")[2] or "overview"
    return file_stem(page, name)


def table_buttons(table: pd.DataFrame, name: str, where: Any = st, *, index: bool = False) -> None:
    """CSV and JSON of all rows.

    Args:
        name: unique among the tables of a page.
    """
    stem = stem_here(name)
    with where.container(horizontal=True, gap="small"):
        for ending, mime, made in (("csv", "text/csv", csv_of), ("json", "application/json", json_of)):
            st.download_button(
                ending.upper(),
                partial(made, table, index=index),
                file_name=f"{stem}.{ending}",
                mime=mime,
                key=f"{ending} of {name}",
                help=f"All {len(table):,} rows as {ending.upper()}",
                on_click="ignore",
                type="tertiary",
                icon=_ICON,
            )


def picture_format() -> str:
    """What the camera on figures saves: ``png`` or ``svg``."""
    return _FORMATS[st.session_state.get(_CHOSEN, "PNG")]


def figure_buttons(figure: go.Figure, name: str, where: Any = st) -> None:
    """The figure as one HTML file, and the choice of what the camera on it saves.

    Args:
        name: unique among the figures of a page.
    """
    stem, key = stem_here(name), f"picture of {name}"
    with where.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.session_state[key] = st.session_state.get(_CHOSEN, "PNG")
        st.radio(
            "What the camera on the figure saves",
            list(_FORMATS),
            horizontal=True,
            key=key,
            format_func=lambda kind: f":material/photo_camera: {kind}",
            on_change=partial(_choose, key),
            label_visibility="collapsed",
        )
        st.download_button(
            "HTML",
            partial(html_of, figure, stem),
            file_name=f"{stem}.html",
            mime="text/html",
            key=f"html of {name}",
            help="The figure as one page that answers to the mouse and needs no network",
            on_click="ignore",
            type="tertiary",
            icon=_ICON,
        )


def _choose(key: str) -> None:
    st.session_state[_CHOSEN] = st.session_state[key]
