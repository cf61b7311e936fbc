"""The Method page's figure: quality lost against bits or sparsity. Pure."""

from __future__ import annotations

import html
import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from harness.cli.output import format_value
from harness.display import FAMILY_COLOURS, axis_title, scale

__all__ = ["COSTS", "MOST_MODELS", "quality_against"]

COSTS = {
    "bits": ("stored bits per weight", "bit", "lower"),
    "sparsity": ("sparsity", "fraction", "higher"),
}
"""What is stored of a weight: name, unit, and which way saves more."""

MOST_MODELS = 6
_EVEN_COLOUR = "#777777"
_FACET_PX = 340


def quality_against(rows: pd.DataFrame, cost: str, metric: str) -> go.Figure:
    """The difference in quality to the baseline against what is stored, one panel a model.

    Args:
        rows: rows of `method_data.against_baseline` joined with `method_data.variants_with`, with
            numbers in `cost` and difference; at least one, of at most `MOST_MODELS` models.
        cost: a key of `COSTS`.
    """
    models = list(dict.fromkeys(rows["model"]))
    wide = 2 if len(models) > 1 else 1
    tall = math.ceil(len(models) / wide)
    figure = make_subplots(
        rows=tall,
        cols=wide,
        subplot_titles=[html.escape(_shortened(model)) for model in models],
        horizontal_spacing=0.12,
        vertical_spacing=0.5 / tall if tall > 1 else 0.0,
    )
    name, cost_unit, cost_better = COSTS[cost]
    x_factor, x_unit = scale(cost_unit, rows[cost])
    unit, direction = str(rows["unit"].iloc[0]), rows["direction"].iloc[0]
    y_factor, y_unit = scale(unit, rows["difference"])
    # A difference of percentages is in percentage points, not in percent.
    y_unit = "points" if y_unit == "%" else y_unit
    y_title = axis_title("difference to baseline", html.escape(y_unit), direction)
    seen: set[str] = set()
    for number, model in enumerate(models):
        place = {"row": number // wide + 1, "col": number % wide + 1}
        of_model = rows[rows["model"] == model]
        for family, mine in of_model.groupby("family", sort=False):
            trace = _points(mine, str(family), cost, (x_factor, x_unit), (y_factor, y_unit))
            trace.update(showlegend=family not in seen, legendgroup=str(family))
            seen.add(str(family))
            figure.add_trace(trace, **place)
    axes: dict[str, object] = {"automargin": True, "title": {"font": {"size": 12}}}
    figure.update_xaxes(axes)
    # The line at zero is the baseline.
    figure.update_yaxes({**axes, "zeroline": True, "zerolinewidth": 2, "zerolinecolor": _EVEN_COLOUR})
    figure.update_xaxes(title_text=axis_title(name, x_unit, cost_better))
    figure.update_yaxes(title_text=y_title)
    figure.update_layout(
        title={"text": html.escape(metric), "font": {"size": 14}},
        height=80 + _FACET_PX * tall,
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.06, "xanchor": "right", "x": 1},
    )
    return figure


def _points(
    mine: pd.DataFrame, family: str, cost: str, x: tuple[float, str], y: tuple[float, str]
) -> go.Scatter:
    x_values, values = mine[cost] * x[0], mine["difference"] * y[0]
    lower, upper = mine["lower"] * y[0], mine["upper"] * y[0]
    hover = [
        "<br>".join(
            html.escape(line)
            for line in (
                f"{row['name']}{' (simulated)' if row['simulated'] is True else ''}",
                row["options"] or "no options",
                f"{format_value(float(at))} {x[1]}",
                f"{format_value(float(value))} {y[1]}{_bounds(low, high)} ({row['compared']})",
                row["caution"],
            )
            if line
        )
        for (_, row), at, value, low, high in zip(
            mine.iterrows(), x_values, values, lower, upper, strict=True
        )
    ]
    colour = FAMILY_COLOURS[family]
    return go.Scatter(
        x=x_values,
        y=values,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (upper - values).fillna(0.0),
            "arrayminus": (values - lower).fillna(0.0),
            "thickness": 1,
            "width": 3,
        },
        mode="markers",
        name=family,
        hovertext=hover,
        hoverinfo="text",
        marker={
            "color": colour,
            "size": 9,
            "symbol": ["circle-open" if each is True else "circle" for each in mine["simulated"]],
            "line": {"width": 2, "color": colour},
        },
    )


def _bounds(low: float, high: float) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f" [{format_value(float(low))}, {format_value(float(high))}]"


def _shortened(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"
