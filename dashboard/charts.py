"""Figures from DataFrames. Pure: no store, no Streamlit.

Every family has a shape of its own beside its colour (`harness.display`), so that colour is never the only
difference. A simulated or synthetic variant is drawn hollow.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from harness.display import FAMILY_COLOURS, axis_title, better, scale
from harness.method import FAMILIES
from harness.pareto import on_front

__all__ = ["FAMILY_STYLES", "comparison", "format_value", "pareto", "pareto_front", "reading"]

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

_TEXT_COLOUR = "#31333F"
_FRONT_COLOUR = "#777777"
_NAME_LENGTH = 34
_LABELLED = 25  # with more points than this, names are left to hovering


def pareto_front(frame: pd.DataFrame, x_better: str, y_better: str) -> pd.Series:
    """Which rows no other row beats: at least as good in `x` and `y` and better in one.

    Args:
        frame: columns ``x`` and ``y``, no NaN.
        x_better, y_better: ``lower`` or ``higher``.
    """
    found = on_front(list(zip(frame["x"], frame["y"], strict=True)), x_better, y_better)
    return pd.Series(found, index=frame.index, dtype=bool)


def pareto(
    frame: pd.DataFrame,
    *,
    x_name: str,
    x_unit: str,
    x_better: str,
    y_name: str,
    y_unit: str,
    y_better: str,
    log_x: bool = False,
) -> go.Figure:
    """Quality against cost, one point a variant, with intervals and the front.

    Args:
        frame: rows of `harness_dashboard.queries.points`.
    """
    x_factor, x_shown = scale(x_unit, frame["x"])
    y_factor, y_shown = scale(y_unit, frame["y"])
    shown = frame.assign(
        **{name: frame[name] * x_factor for name in ("x", "x_lower", "x_upper")},
        **{name: frame[name] * y_factor for name in ("y", "y_lower", "y_upper")},
    )
    shown["front"] = pareto_front(frame, x_better, y_better)
    shown["at_edge"] = shown["x"] > shown["x"].min() + 0.7 * (shown["x"].max() - shown["x"].min())
    figure = go.Figure()
    figure.add_trace(_front_line(shown[shown["front"]], y_better, x_better))
    for family in FAMILIES:
        rows = shown[shown["family"] == family]
        if len(rows):
            # The legend shows the first point's shape: a filled one where there is one.
            rows = rows.sort_values("marks", kind="stable")
            figure.add_trace(_family_trace(rows, family, x_shown, y_shown, len(shown)))
    figure.update_layout(
        xaxis_title=axis_title(html.escape(x_name), x_shown, x_better),
        yaxis_title=axis_title(html.escape(y_name), y_shown, y_better),
        legend={"title": "family", "itemsizing": "constant"},
        hoverlabel={"align": "left"},
        font={"color": _TEXT_COLOUR},
        height=560,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
    )
    figure.update_xaxes(type="log" if log_x else "linear", automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def _front_line(rows: pd.DataFrame, y_better: str, x_better: str) -> go.Scatter:
    ordered = rows.sort_values(["x", "y"], ascending=[True, y_better == "higher"])
    # Between two points of the front only the worse of both values is known to be reachable.
    return go.Scatter(
        x=ordered["x"],
        y=ordered["y"],
        mode="lines",
        name="Pareto front",
        line={
            "color": _FRONT_COLOUR,
            "dash": "dot",
            "width": 2,
            "shape": "hv" if x_better == "lower" else "vh",
        },
        hoverinfo="skip",
    )


def _family_trace(rows: pd.DataFrame, family: str, x_unit: str, y_unit: str, total: int) -> go.Scatter:
    colour, symbol = FAMILY_STYLES[family]
    hover = [
        "<br>".join(
            html.escape(line)
            for line in (
                f"{row.name_}{f' ({row.marks})' if row.marks else ''}",
                row.model,
                row.knobs or "no options",
                f"x: {reading(row.x, row.x_lower, row.x_upper)} {x_unit}",
                f"y: {reading(row.y, row.y_lower, row.y_upper)} {y_unit}",
                row.device_name,
            )
        )
        for row in rows.rename(columns={"name": "name_"}).itertuples()
    ]
    return go.Scatter(
        x=rows["x"],
        y=rows["y"],
        error_x=_bars(rows, "x"),
        error_y=_bars(rows, "y"),
        mode="markers+text" if total <= _LABELLED else "markers",
        name=family,
        text=[_label(_shortened(row["name"]), row["marks"]) for _, row in rows.iterrows()],
        # Beside the interval's bars, and on the inner side at the right edge.
        textposition=["top left" if at_edge else "top right" for at_edge in rows["at_edge"]],
        textfont={"size": 11},
        cliponaxis=False,
        hovertext=hover,
        hoverinfo="text",
        marker={
            "color": colour,
            "size": [14 if on_front else 10 for on_front in rows["front"]],
            "opacity": 1,
            "symbol": [f"{symbol}-open" if marks else symbol for marks in rows["marks"]],
            "line": {"width": 2, "color": colour},
        },
    )


def comparison(frame: pd.DataFrame, names: Sequence[str]) -> go.Figure:
    """One metric at one place, one point with its interval for each of the variants.

    Args:
        frame: rows of `harness_dashboard.queries.newest` of one column.
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
                error_x=_bars(row.to_frame().T, "value", "lower", "upper"),
                mode="markers+text",
                text=[format_value(row["value"])],
                textposition="top center",
                cliponaxis=False,
                hovertext=[f"{_label(row['name'], row['marks'])}<br>{html.escape(text)}"],
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
        font={"color": _TEXT_COLOUR},
        height=130 + 42 * len(names),
        margin={"l": 10, "r": 20, "t": 45, "b": 10},
    )
    figure.update_yaxes(
        tickvals=list(places.values()),
        ticktext=[html.escape(_shortened(name)) for name in names],
        range=[len(names) - 0.4, -0.7],
        automargin=True,
    )
    figure.update_xaxes(automargin=True)
    return figure


def _bars(
    rows: pd.DataFrame, value: str, lower: str | None = None, upper: str | None = None
) -> dict[str, object]:
    lower, upper = lower or f"{value}_lower", upper or f"{value}_upper"
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows[upper] - rows[value]).astype("float64").fillna(0.0),
        "arrayminus": (rows[value] - rows[lower]).astype("float64").fillna(0.0),
        "thickness": 1,
        "width": 3,
    }


def _shortened(name: str) -> str:
    """A name that leaves room for the chart; hovering shows it whole."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _label(name: str, marks: str) -> str:
    return html.escape(f"{name} ({marks})" if marks else name)


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
