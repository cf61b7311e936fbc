"""Figures on a page: in the reader's theme, and with what takes them home."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import streamlit as st

from .buttons import figure_buttons, picture_format, stem_here
from .theme import themed

__all__ = ["show_figure"]

_SCALE = 2  # of a PNG, for print and for dense screens


def show_figure(figure: go.Figure, name: str, where: Any = st, *, alt: str | None = None) -> None:
    """Draw a figure as wide as its place, with its downloads below.

    Pictures are made by the browser: the camera on the figure saves what is drawn, zoom and theme included.

    Args:
        figure: as `charts` draws it, for a light ground.
        name: what the figure shows, unique on its page; file names and the widgets' keys follow from it.
        where: a Streamlit container.
        alt: what the figure shows in words, for those who cannot see it.
    """
    where.plotly_chart(
        themed(figure, dark=st.context.theme.type == "dark"),
        width="stretch",
        key=f"figure {name}",
        config={
            "displaylogo": False,
            "toImageButtonOptions": {
                "format": picture_format(),
                "filename": stem_here(name),
                "scale": _SCALE,
            },
        },
        alt=alt,
    )
    figure_buttons(figure, name, where)
