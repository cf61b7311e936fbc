"""The light and the dark theme: what Streamlit is told, and figures in the colours of either. Pure.

`charts` draws for a light ground. On a dark one `themed` changes the families' colours and lifts every other
colour that would be lost on it.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.display import DARK_FAMILY_COLOURS, FAMILY_COLOURS

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "DARK",
    "GRAPHIC_CONTRAST",
    "LIGHT",
    "SETTINGS",
    "TEXT_CONTRAST",
    "Theme",
    "contrast",
    "readable",
    "themed",
]

GRAPHIC_CONTRAST, TEXT_CONTRAST = 3.0, 4.5
"""What WCAG 2.2 asks for at level AA: of parts of a chart (1.4.11) and of text (1.4.3)."""


class Theme(NamedTuple):
    """The colours of a theme; the names are Streamlit's."""

    background: str
    secondary_background: str
    text: str
    primary: str
    link: str


LIGHT = Theme("#FFFFFF", "#F3F4F6", "#1F2328", "#4B3FB5", "#4B3FB5")
DARK = Theme("#14161A", "#23272E", "#E8EAED", "#6F63E3", "#A9A0F5")

_OPTIONS = ("backgroundColor", "secondaryBackgroundColor", "textColor", "primaryColor", "linkColor")
SETTINGS = {
    f"theme.{name}.{option}": colour
    for name, theme in (("light", LIGHT), ("dark", DARK))
    for option, colour in zip(_OPTIONS, theme, strict=True)
}
"""Options of the server. With both themes set, the reader's system decides, and the page's menu over it."""

_HEX = re.compile(r"#[0-9a-fA-F]{6}")
_DARK_OF = {
    **{FAMILY_COLOURS[name].upper(): colour for name, colour in DARK_FAMILY_COLOURS.items()},
    LIGHT.text: DARK.text,
    "#31333F": DARK.text,  # what charts write in
}


def themed(figure: go.Figure, *, dark: bool) -> go.Figure:
    """The figure for the reader's theme, as a copy."""
    import plotly.graph_objects as go  # not needed to start the server, nor to say that it is missing

    drawn = figure.to_dict()
    layout = dict(drawn.get("layout", {}))
    layout.pop("template", None)  # Streamlit brings its own for either theme
    whole = {"data": drawn.get("data", []), "layout": layout}
    changed = go.Figure(_recoloured(whole, "") if dark else whole)
    # Streamlit's own grey of axes is too faint to read (3.7:1).
    text = (DARK if dark else LIGHT).text
    changed.update_layout(font_color=text, legend_font_color=text, legend_title_font_color=text)
    changed.update_layout(title_font_color=text)
    for axes in (changed.update_xaxes, changed.update_yaxes):
        axes(tickfont_color=text, title_font_color=text)
    return changed


def _recoloured(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _recoloured(each, name) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_recoloured(each, key) for each in value]
    # Only where a colour stands: a name that looks like one is left alone.
    if isinstance(value, str) and key.endswith("color") and _HEX.fullmatch(value):
        ground = key in ("bgcolor", "paper_bgcolor", "plot_bgcolor")
        return value if ground else _DARK_OF.get(value.upper(), readable(value, DARK.background))
    return value


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """The contrast of two colours, from 1 to 21 (WCAG 2.2, contrast ratio).

    >>> contrast("#000000", "#FFFFFF")
    21.0
    """
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def readable(colour: str, ground: str, least: float = TEXT_CONTRAST) -> str:
    """The colour, made lighter where its contrast with a dark ground is less than it should be.

    >>> readable("#31333F", "#14161A"), readable("#E8EAED", "#14161A")
    ('#7B7F98', '#E8EAED')
    """
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    while contrast(colour, ground) < least and lightness < 1:
        lightness = min(1.0, lightness + 0.02)
        parts = colorsys.hls_to_rgb(hue, lightness, saturation)
        colour = "#" + "".join(f"{round(255 * part):02X}" for part in parts)
    return colour
