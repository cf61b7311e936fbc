"""Quality against cost: the front, two or three axes, one figure a model. Pure: no store, no Streamlit.

A third axis is the area of the points: a drawing in three dimensions hides what is behind, and colour is
taken by the family.
"""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from harness.display import axis_title, scale
from harness.method import FAMILIES
from harness.pareto import on_front

from .charts import FAMILY_STYLES, TEXT_COLOUR, error_bars, label, reading, told_apart

__all__ = ["Axis", "pareto", "pareto_front"]

_FRONT_COLOUR = "#777777"
_LABELLED = 25  # with more points than this, names are left to hovering
_WITH_BARS = 200  # with more, only the front has intervals
_DRAWN = 1200  # more are a blot, and slow in a browser
_SIZES = (6.0, 30.0)  # diameters in pixels of the smallest and the largest value of a third axis


@dataclass(frozen=True)
class Axis:
    """What one axis shows. `direction` is ``lower`` or ``higher``."""

    name: str
    unit: str
    direction: str
    is_log: bool = False


def pareto_front(frame: pd.DataFrame, better: Mapping[str, str]) -> pd.Series:
    """Which rows no other row beats: at least as good everywhere and better somewhere.

    Args:
        frame: the columns that `better` names, no NaN.
        better: two or three columns, each with ``lower`` or ``higher``.
    """
    names = list(better)
    if len(names) == 2:
        points = list(zip(frame[names[0]], frame[names[1]], strict=True))
        return pd.Series(on_front(points, *better.values()), index=frame.index, dtype=bool)
    signs = np.array([1.0 if better[name] == "lower" else -1.0 for name in names])
    costs = frame[names].to_numpy(np.float64) * signs  # [rows, axes], lower is better
    found = np.zeros(len(costs), dtype=bool)
    # In this order no later row beats an earlier one, so each is held only against the front so far.
    for place in np.lexsort(costs.T[::-1]):
        front = costs[found]
        at_least = (front <= costs[place]).all(axis=1)
        found[place] = not (at_least & (front < costs[place]).any(axis=1)).any()
    return pd.Series(found, index=frame.index, dtype=bool)


def pareto(frame: pd.DataFrame, x: Axis, y: Axis, z: Axis | None = None, *, height: int = 560) -> go.Figure:
    """One point a variant, with intervals and the front.

    With a third axis the front is that of all three, and what is on it has a ring. With many points the
    names, the intervals of what is not on the front, and at last some of the points that are beaten are left
    out; the number of those is in the figure's ``layout.meta["left_out"]``. What has no place on an axis
    (infinity, and on a logarithmic one zero and below) is not drawn; its names are in ``meta["off_axis"]``.

    Args:
        frame: rows of `harness_dashboard.queries.points` with what describes each variant.
    """
    axes = {"x": x, "y": y} | ({} if z is None else {"z": z})
    shown, units = frame.copy(), {}
    for axis, about in axes.items():
        factor, units[axis] = scale(about.unit, frame[axis])
        for name in (axis, f"{axis}_lower", f"{axis}_upper"):
            shown[name] = frame[name] * factor
    shown["front"] = pareto_front(frame, {axis: about.direction for axis, about in axes.items()})
    has_place = _has_place(shown["x"], x) & _has_place(shown["y"], y)
    off_axis = shown.loc[~has_place, "name"].tolist()
    shown, left_out = _thinned(shown[has_place])
    place = _position(shown["x"], x.is_log)
    shown["at_edge"] = place > place.min() + 0.7 * (place.max() - place.min())
    shown["size"] = _sizes(shown, z)
    shown["short"] = told_apart(shown["name"].tolist())
    figure = go.Figure()
    if z is None:
        figure.add_trace(_front_line(shown[shown["front"]], x.direction, y.direction))
    for family in FAMILIES:
        rows = shown[shown["family"] == family]
        if len(rows):
            # The legend shows the first point's shape: a filled one where there is one.
            rows = rows.sort_values("marks", kind="stable")
            figure.add_trace(_family_trace(rows, family, units, len(shown)))
    if z is not None:
        figure.add_trace(_rings(shown[shown["front"]]))
    figure.update_layout(
        xaxis_title=_title(x, units["x"]),
        yaxis_title=_title(y, units["y"]),
        # Above the chart, so that it takes no width on a telephone.
        legend={"itemsizing": "constant", "orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hoverlabel={"align": "left"},
        font={"color": TEXT_COLOUR},
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        meta={"left_out": left_out, "off_axis": off_axis},
    )
    figure.update_xaxes(type="log" if x.is_log else "linear", automargin=True)
    figure.update_yaxes(type="log" if y.is_log else "linear", automargin=True)
    return figure


def _title(axis: Axis, unit: str) -> str:
    return axis_title(html.escape(axis.name), unit, axis.direction)


def _thinned(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """All of the front and as many of the others, evenly spread, as a browser draws at once."""
    beaten = rows[~rows["front"]].sort_values("x")
    most = max(0, _DRAWN - int(rows["front"].sum()))
    if len(beaten) <= most:
        return rows, 0
    kept = beaten.iloc[np.linspace(0, len(beaten) - 1, most).astype(int)]
    return pd.concat([rows[rows["front"]], kept]), len(beaten) - len(kept)


def _has_place(values: pd.Series, axis: Axis) -> pd.Series:
    found = np.isfinite(values)
    return found & (values > 0) if axis.is_log else found


def _position(values: pd.Series, is_log: bool) -> pd.Series:
    return np.log10(values.where(values > 0)) if is_log else values


def _sizes(rows: pd.DataFrame, z: Axis | None) -> pd.Series:
    """The diameters: with a third axis the area grows with the value, else the front is a little larger."""
    if z is None:
        return pd.Series(np.where(rows["front"], 14, 10), index=rows.index)
    place = _position(rows["z"], z.is_log)
    known = place[np.isfinite(place)]
    spread = known.max() - known.min()
    share = (place - known.min()) / spread if spread > 0 else place - known.min() + 0.5
    share = share.clip(0.0, 1.0)  # what is infinite is as large, or as small, as what is drawn
    least, most = _SIZES
    return np.sqrt(least**2 + share.fillna(0.0) * (most**2 - least**2))


def _front_line(rows: pd.DataFrame, x_better: str, y_better: str) -> go.Scatter:
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


def _rings(rows: pd.DataFrame) -> go.Scatter:
    return go.Scatter(
        x=rows["x"],
        y=rows["y"],
        mode="markers",
        name="Pareto front of all three",
        marker={
            "symbol": "circle-open",
            "size": (rows["size"] + 8).tolist(),
            "color": _FRONT_COLOUR,
            "line": {"width": 2, "color": _FRONT_COLOUR},
        },
        hoverinfo="skip",
    )


def _family_trace(rows: pd.DataFrame, family: str, units: Mapping[str, str], total: int) -> go.Scatter:
    colour, symbol = FAMILY_STYLES[family]
    barred = rows if total <= _WITH_BARS else rows.assign(**_bounds_of_front(rows))
    named = total <= _LABELLED
    return go.Scatter(
        x=rows["x"],
        y=rows["y"],
        error_x=error_bars(barred, "x"),
        error_y=error_bars(barred, "y"),
        mode="markers+text" if named else "markers",
        name=family,
        text=[label(row["short"], row["marks"]) for _, row in rows.iterrows()] if named else None,
        # Beside the interval's bars, and on the inner side at the right edge.
        textposition=["top left" if at_edge else "top right" for at_edge in rows["at_edge"]]
        if named
        else None,
        textfont={"size": 11},
        cliponaxis=False,
        hovertext=[_hover(row, units) for row in rows.to_dict("records")],
        hoverinfo="text",
        marker={
            "color": colour,
            "size": rows["size"].tolist(),
            "opacity": 1,
            "symbol": [f"{symbol}-open" if marks else symbol for marks in rows["marks"]],
            "line": {"width": 2, "color": colour},
        },
    )


def _bounds_of_front(rows: pd.DataFrame) -> dict[str, pd.Series]:
    return {name: rows[name].where(rows["front"]) for name in ("x_lower", "x_upper", "y_lower", "y_upper")}


def _hover(row: Mapping[Hashable, Any], units: Mapping[str, str]) -> str:
    figures = [
        f"{axis}: {reading(row[axis], row[f'{axis}_lower'], row[f'{axis}_upper'])} {unit}".strip()
        for axis, unit in units.items()
    ]
    marks = f" ({row['marks']})" if row["marks"] else ""
    lines = (
        f"{row['name']}{marks}",
        row["model"],
        row["knobs"] or "no options",
        *figures,
        row["device_name"],
    )
    return "<br>".join(html.escape(str(line)) for line in lines)
