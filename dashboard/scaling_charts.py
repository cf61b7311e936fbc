"""The Scaling page's figures: DataFrames in, Plotly figures out. Pure.

Both axes are logarithmic, so that a power law is a straight line and its exponent is the slope. Lines of one
family have one colour; dashes and markers tell its variants apart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go

from harness.cli.output import format_value
from harness.comparing.crossings import Crossing
from harness.comparing.growth import Axis
from harness.display import FAMILY_COLOURS, axis_title, scale

from .charts import told_apart
from .variant_names import marked

__all__ = ["AXIS_TITLES", "growth", "ratios"]

AXIS_TITLES = {Axis.PROMPT_LEN: "prompt length [tokens]", Axis.BATCH_SIZE: "batch size [sequences]"}

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_EVEN_COLOUR, _CROSSING_COLOUR = "#777777", "#AA3377"
_NAME_LENGTH = 30


def growth(points: pd.DataFrame, fits: pd.DataFrame, axis: Axis, metric: str) -> go.Figure:
    """A metric against the sizes of an axis, one line a variant, with intervals and the fitted power laws.

    A variant whose sizes were not measured alike has several lines.

    Args:
        points: rows of `scaling_data.points` of one metric, at least one.
        fits: rows of `scaling_data.fits`; those with an exponent are drawn as thin lines.
    """
    factor, unit = scale(str(points["unit"].iloc[0]), points["value"])
    unit = html.escape(unit)
    figure = go.Figure()
    names = dict(zip(points["variant"], points["name"], strict=True))
    short = dict(zip(names, told_apart(list(names.values()), _NAME_LENGTH), strict=True))
    of_metric = fits[fits["metric"] == metric]
    for number, variant in enumerate(names):
        mine = points[points["variant"] == variant]
        for place, line in mine.groupby("line", sort=False):
            told = _telling(line, mine)
            marks = str(line["marks"].iloc[0])
            name, legend = (marked(f"{each}{told}", marks) for each in (names[variant], short[variant]))
            colour = FAMILY_COLOURS[str(line["family"].iloc[0])]
            figure.add_trace(_measured(line, name, legend, colour, number, factor, unit))
            fit = of_metric[(of_metric["variant"] == variant) & (of_metric["line"] == place)]
            if fit["exponent"].notna().any():
                figure.add_trace(_fitted(line, float(fit["exponent"].iloc[0]), colour, factor))
    sizes = sorted({int(size) for size in points["size"]})
    _finish(figure, axis, sizes, axis_title(html.escape(metric), unit, "lower"))
    return figure


def ratios(crossings: Sequence[Crossing], name_a: str, name_b: str) -> go.Figure:
    """The ratio b/a of a time along an axis, the line where both cost the same, and where it is crossed.

    Args:
        crossings: all of one line (the same sizes and the same metric), at least one.
    """
    first = crossings[0]
    sizes = list(first.ratios)
    values = [first.ratios[size] for size in sizes]
    bounds = [first.intervals[size] for size in sizes]
    figure = go.Figure()
    hover = [_ratio_text(size, first) for size in sizes]
    figure.add_trace(
        go.Scatter(
            x=sizes,
            y=values,
            error_y=_bars(values, [low for low, _ in bounds], [high for _, high in bounds]),
            mode="lines+markers",
            name="measured ratio",
            line={"color": FAMILY_COLOURS["other"], "width": 2},
            marker={"size": 9, "symbol": "circle"},
            hovertext=hover,
            hoverinfo="text",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=[sizes[0], sizes[-1]],
            y=[1, 1],
            mode="lines",
            name="same time",
            line={"color": _EVEN_COLOUR, "dash": "dot", "width": 2},
            hoverinfo="skip",
        )
    )
    crossed = [each for each in crossings if each.found.batch is not None]
    if crossed:
        figure.add_trace(_crossed(crossed, sizes))
    a, b = map(html.escape, told_apart([name_a, name_b], _NAME_LENGTH))
    title = f"time of {b}<br>over time of {a}<br>(below 1: {b} is faster)"
    _finish(figure, first.axis, sizes, title)
    figure.update_yaxes(title_font_size=12)
    return figure


def _crossed(crossed: Sequence[Crossing], sizes: Sequence[int]) -> go.Scatter:
    at = [float(each.found.batch or math.nan) for each in crossed]
    # An interval that leaves what was measured ends at the last size that was.
    low = [max(each.found.lower, sizes[0]) if each.found.lower else None for each in crossed]
    high = [min(each.found.upper, sizes[-1]) if each.found.upper else None for each in crossed]
    return go.Scatter(
        x=at,
        y=[1.0] * len(at),
        error_x={**_bars(at, low, high), "thickness": 2, "width": 6},
        mode="markers+text",
        name="crossing",
        text=[format_value(place) for place in at],
        textposition="top center",
        marker={"size": 13, "symbol": "star-diamond", "color": _CROSSING_COLOUR},
        hovertext=[f"crossing at {html.escape(str(each.found))}" for each in crossed],
        hoverinfo="text",
    )


def _measured(
    line: pd.DataFrame, name: str, legend: str, colour: str, number: int, factor: float, unit: str
) -> go.Scatter:
    values, lower, upper = (line[column] * factor for column in ("value", "lower", "upper"))
    hover = [
        f"{html.escape(name)}<br>{size:,}: {format_value(float(value))} {unit}"
        + ("" if math.isnan(low) else f" [{format_value(float(low))}, {format_value(float(high))}]")
        for size, value, low, high in zip(line["size"], values, lower, upper, strict=True)
    ]
    symbol = _SYMBOLS[number % len(_SYMBOLS)]
    return go.Scatter(
        x=line["size"],
        y=values,
        error_y=_bars(values, lower, upper),
        mode="lines+markers",
        name=html.escape(legend),
        line={"color": colour, "dash": _DASHES[number % len(_DASHES)], "width": 2},
        marker={"color": colour, "symbol": f"{symbol}-open" if line["marks"].iloc[0] else symbol, "size": 9},
        hovertext=hover,
        hoverinfo="text",
    )


def _fitted(line: pd.DataFrame, exponent: float, colour: str, factor: float) -> go.Scatter:
    """The power law of this exponent through the middle of the points (in logarithms)."""
    middle_x = sum(math.log(size) for size in line["size"]) / len(line)
    middle_y = sum(math.log(value * factor) for value in line["value"]) / len(line)
    ends = [float(line["size"].min()), float(line["size"].max())]
    return go.Scatter(
        x=ends,
        y=[math.exp(middle_y + exponent * (math.log(end) - middle_x)) for end in ends],
        mode="lines",
        line={"color": colour, "width": 1},
        opacity=0.45,
        hoverinfo="skip",
        showlegend=False,
    )


def _bars(
    values: Iterable[float], lower: Iterable[float | None], upper: Iterable[float | None]
) -> dict[str, object]:
    """Asymmetric bars from the bounds of intervals; none where a bound is not known."""
    rows = list(zip(values, lower, upper, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if high is None or math.isnan(high) else high - value for value, _, high in rows],
        "arrayminus": [0.0 if low is None or math.isnan(low) else value - low for value, low, _ in rows],
        "thickness": 1,
        "width": 3,
    }


def _ratio_text(size: int, crossing: Crossing) -> str:
    low, high = crossing.intervals[size]
    bounds = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{size:,}: {crossing.ratios[size]:.3g}{bounds}<br>{html.escape(crossing.bases[size])}"


def _finish(figure: go.Figure, axis: Axis, sizes: Sequence[int], y_title: str) -> None:
    figure.update_layout(
        height=430,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        hoverlabel={"align": "left"},
        # Above, so that a narrow screen leaves the width to the lines.
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
    )
    figure.update_xaxes(
        type="log",
        title=AXIS_TITLES[axis],
        tickvals=list(sizes),
        ticktext=[f"{size:,}" for size in sizes],
        automargin=True,
    )
    figure.update_yaxes(type="log", title=y_title, automargin=True)


def _telling(line: pd.DataFrame, of_variant: pd.DataFrame) -> str:
    """What tells a line from the others of its variant: how it was taken, or else its sizes."""
    modes = of_variant.drop_duplicates("line")["mode"].fillna("")
    mode = "" if pd.isna(line["mode"].iloc[0]) else line["mode"].iloc[0]
    told = [mode] if mode and modes.nunique() > 1 else []
    if (modes == mode).sum() > 1:
        told.append(f"{line['size'].min():,} to {line['size'].max():,}")
    return f" ({', '.join(told)})" if told else ""
