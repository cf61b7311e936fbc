"""What lies behind the figures of a few variants, drawn. Pure: no store, no Streamlit."""

from __future__ import annotations

import html
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from harness.display import axis_title, scale
from harness.why import ACHIEVED, Explanation

from .charts import FAMILY_STYLES, TEXT_COLOUR, format_value, label, shortened, told_apart
from .queries import Column, marks_text

__all__ = ["KERNEL_COLOURS", "ceilings", "distributions", "kernel_shares"]

KERNEL_COLOURS = (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#000000",
)  # fmt: skip
"""Paul Tol's bright scheme, for what is no family of methods; each has a pattern beside it."""

_PATTERNS = ("", "/", "x", ".", "\\", "+", "|", "-")
_BOUNDS = {
    "decode_mbu": "decode, bytes/s",
    "decode_mfu": "decode, FLOP/s",
    "prefill_mfu": "prefill, FLOP/s",
}


def distributions(readings: pd.DataFrame, column: Column, about: pd.DataFrame) -> go.Figure:
    """The raw readings of one column: a box and every single reading for each variant.

    Args:
        readings: `harness_dashboard.queries.readings`.
        about: `harness_dashboard.queries.described`, in the order of the page.
    """
    mine = readings[readings["column"] == column.name]
    factor, unit = scale(column.unit, mine["reading"])
    figure = go.Figure()
    for row, name in zip(about.to_dict("records"), told_apart(about["name"].tolist()), strict=True):
        values = mine.loc[mine["variant"] == row["variant"], "reading"] * factor
        colour, symbol = FAMILY_STYLES[row["family"]]
        figure.add_trace(
            go.Box(
                x=values,
                name=label(name, row["marks"]),
                orientation="h",
                boxpoints="all",
                jitter=0.6,
                pointpos=0,
                marker={"color": colour, "size": 5, "symbol": symbol, "opacity": 0.7},
                line={"color": colour, "width": 1.5},
                fillcolor="rgba(0,0,0,0)",
                showlegend=False,
            )
        )
    figure.update_layout(
        title={"text": f"Readings of {html.escape(column.name)}", "font": {"size": 14}},
        xaxis_title=axis_title("", unit, column.direction).strip(),
        font={"color": TEXT_COLOUR},
        height=130 + 60 * len(about),
        margin={"l": 10, "r": 20, "t": 45, "b": 10},
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def kernel_shares(found: Mapping[int, Explanation], names: Mapping[int, str], phase: str) -> go.Figure | None:
    """How the time of one prefill or decode step is shared among kinds of kernels; None where nobody looked.

    Args:
        found: explanations by variant, in the order of the page.
        phase: ``prefill`` or ``decode``.
    """
    shares: dict[str, dict[int, float]] = {}
    hovers: dict[tuple[str, int], list[str]] = {}
    for variant, explanation in found.items():
        for kernel in explanation.kernels:
            if kernel.phase == phase:
                of_family = shares.setdefault(kernel.family, {})
                of_family[variant] = of_family.get(variant, 0.0) + kernel.share * 100
                line = f"{shortened(kernel.name)}: {kernel.share:.1%}, {kernel.calls} calls"
                hovers.setdefault((kernel.family, variant), []).append(html.escape(line))
    if not shares:
        return None
    variants = [variant for variant in found if any(variant in of for of in shares.values())]
    shown = [
        label(name, marks_text(simulated=bool(found[variant].simulated), synthetic=found[variant].synthetic))
        for variant, name in zip(variants, told_apart([names[variant] for variant in variants]), strict=True)
    ]
    figure = go.Figure()
    ordered = sorted(shares, key=lambda family: -max(shares[family].values()))
    for number, family in enumerate(ordered):
        figure.add_trace(
            go.Bar(
                y=shown,
                x=[shares[family].get(variant, 0.0) for variant in variants],
                orientation="h",
                name=html.escape(family),
                hovertext=["<br>".join(hovers.get((family, variant), [])) for variant in variants],
                hoverinfo="text+name",
                marker={
                    "color": KERNEL_COLOURS[number % len(KERNEL_COLOURS)],
                    "pattern": {"shape": _PATTERNS[number % len(_PATTERNS)]},
                },
            )
        )
    figure.update_layout(barmode="stack", xaxis_title="share of the kernels' time [%]")
    return _bars_layout(figure, f"What ran in one {phase} step", len(variants))


def ceilings(found: Mapping[int, Explanation], about: pd.DataFrame) -> go.Figure | None:
    """The roofline in one dimension: what was achieved over what this device can do; None where not known."""
    known = about.set_index("variant")
    shown = dict(zip(about["variant"], told_apart(about["name"].tolist()), strict=True))
    figure = go.Figure()
    for variant, explanation in found.items():
        bounds, values, words = [], [], []
        for _, _, _, achieved, share in ACHIEVED:
            value, rate = explanation.value(share), explanation.value(achieved)
            if value is None:
                continue
            bounds.append(_BOUNDS[share])
            values.append(value * 100)
            words.append(_achieved(rate, value, explanation.records.get(achieved, {}).get("unit") or ""))
        if not bounds:
            continue
        colour, _ = FAMILY_STYLES[known.at[variant, "family"]]
        figure.add_trace(
            go.Bar(
                y=bounds,
                x=values,
                orientation="h",
                name=label(shown[variant], known.at[variant, "marks"]),
                hovertext=[html.escape(each) for each in words],
                hoverinfo="text+name",
                text=[f"{value:.0f} %" for value in values],
                marker={
                    "color": colour,
                    "pattern": {"shape": _PATTERNS[len(figure.data) % len(_PATTERNS)]},
                },
            )
        )
    if not figure.data:
        return None
    figure.add_vline(x=100, line={"color": "#777777", "dash": "dot"})
    figure.update_layout(barmode="group", xaxis_title="share of this device's ceiling [%] (higher is better)")
    return _bars_layout(figure, "Achieved against possible", 2 + len(figure.data))


def _achieved(rate: float | None, share: float, unit: str) -> str:
    if rate is None:
        return f"{share:.1%} of the ceiling"
    return f"{format_value(rate)} of {format_value(rate / share)} {unit}" if share else f"0 {unit}"


def _bars_layout(figure: go.Figure, title: str, rows: int) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 14}},
        font={"color": TEXT_COLOUR},
        height=190 + 45 * rows,
        legend={"orientation": "h", "yanchor": "top", "y": -0.35, "x": 0},
        margin={"l": 10, "r": 20, "t": 45, "b": 10},
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
