"""Figures from DataFrames. Pure: no store, no Streamlit.

Every family has a shape of its own beside its colour (`harness.display`), so that colour is never the only
difference. A simulated or synthetic variant is drawn hollow.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from harness.display import FAMILY_COLOURS, axis_title, better, scale

from .variant_names import marked

__all__ = [
    "FAMILY_STYLES",
    "TEXT_COLOUR",
    "comparison",
    "error_bars",
    "format_value",
    "label",
    "reading",
    "shortened",
    "told_apart",
]

_MARKERS = {
    "baseline": "star",
    "quantization": "circle",
    "pruning": "square",
    "distillation": "diamond",
    "sparsity": "triangle-up",
    "moe": "triangle-down",
    "attention": "pentagon",
    "recurrence": "hexagon",
    "adaptive": "cross",
    "serving": "x",
    "external": "hourglass",
    "other": "bowtie",
}
FAMILY_STYLES = {name: (colour, _MARKERS[name]) for name, colour in FAMILY_COLOURS.items()}
"""Colour and marker of each family."""

TEXT_COLOUR = "#31333F"
_NAME_LENGTH = 34


def comparison(frame: pd.DataFrame, names: Sequence[str]) -> go.Figure:
    """One metric at one place, one point with its interval for each of the variants.

    Args:
        frame: the readings of one column (`harness_dashboard.queries.values`) with what describes each
            variant and the column's metric, unit and kind.
        names: all variants in the order of the page; one without a value keeps its line.
    """
    first = frame.iloc[0]
    factor, unit = scale(first["unit"], frame["value"])
    rows = frame.assign(**{name: frame[name] * factor for name in ("value", "lower", "upper")})
    places = {name: place for place, name in enumerate(names)}
    figure = go.Figure()
    for _, row in rows.iterrows():
        colour, symbol = FAMILY_STYLES[row["family"]]
        text = f"{reading(row['value'], row['lower'], row['upper'])} {unit}".strip()
        figure.add_trace(
            go.Scatter(
                x=[row["value"]],
                y=[places[row["name"]]],
                error_x=error_bars(row.to_frame().T, "value", "lower", "upper"),
                mode="markers+text",
                text=[format_value(row["value"])],
                textposition="top center",
                cliponaxis=False,
                hovertext=[f"{label(row['name'], row['marks'])}<br>{html.escape(text)}"],
                hoverinfo="text",
                marker={
                    "color": colour,
                    "size": 12,
                    "symbol": f"{symbol}-open" if row["marks"] else symbol,
                    "line": {"width": 2, "color": colour},
                },
                showlegend=False,
            )
        )
    direction = better(first["metric"], first["unit"], first["kind"])
    figure.update_layout(
        title={"text": html.escape(first["column"]), "font": {"size": 14}},
        xaxis_title=axis_title("", unit, direction).strip(),
        font={"color": TEXT_COLOUR},
        height=130 + 42 * len(names),
        margin={"l": 10, "r": 20, "t": 45, "b": 10},
    )
    figure.update_yaxes(
        tickvals=list(places.values()),
        ticktext=[html.escape(name) for name in told_apart(names)],
        range=[len(names) - 0.4, -0.7],
        automargin=True,
    )
    figure.update_xaxes(automargin=True)
    return figure


def error_bars(
    rows: pd.DataFrame, value: str, lower: str | None = None, upper: str | None = None
) -> dict[str, object]:
    """The bars of an interval, for Plotly; none where there is no interval."""
    lower, upper = lower or f"{value}_lower", upper or f"{value}_upper"
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows[upper] - rows[value]).astype("float64").fillna(0.0),
        "arrayminus": (rows[value] - rows[lower]).astype("float64").fillna(0.0),
        "thickness": 1,
        "width": 3,
    }


def shortened(name: str) -> str:
    """A name that leaves room for the chart; hovering shows it whole."""
    return _cut(name, _NAME_LENGTH)


def told_apart(names: Sequence[str], length: int = _NAME_LENGTH) -> list[str]:
    """The names shortened, those that would then be alike by their middle, so that no two become one.

    Options stand at a name's end. Plotly draws what has one name on an axis as one bar.

    >>> told_apart(["rtn", "rtn:bits=4:group_size=64", "rtn:bits=4:group_size=128"], 14)
    ['rtn', 'rtn:bi…size=64', 'rtn:bi…ize=128']
    """
    shown = [_cut(name, length) for name in names]
    for cut in (_cut_inside, lambda name, _: name):
        times = Counter(shown)
        shown = [
            cut(name, length) if times[each] > 1 else each for name, each in zip(names, shown, strict=True)
        ]
    return shown


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _cut_inside(name: str, length: int) -> str:
    if len(name) <= length:
        return name
    end = length // 2
    return f"{name[: length - 1 - end]}…{name[-end:]}"


def label(name: str, marks: str) -> str:
    """A variant's name with its marks, as text that Plotly will not read as markup."""
    return html.escape(marked(name, marks))


def format_value(value: float) -> str:
    """Four significant digits, never in exponents where it can be helped.

    >>> format_value(1234567.0), format_value(0.01234), format_value(float("nan"))
    ('1,234,567', '0.01234', '–')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def reading(value: float, lower: float, upper: float) -> str:
    """A value with its interval, where it has one.

    >>> reading(1.5, 1.0, 2.0), reading(1.5, float("nan"), float("nan"))
    ('1.5 [1, 2]', '1.5')
    """
    if math.isnan(lower) or math.isnan(upper):
        return format_value(value)
    return f"{format_value(value)} [{format_value(lower)}, {format_value(upper)}]"
