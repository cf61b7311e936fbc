"""What is best: two or three figures against each other, with the variants that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from harness.comparability import scope_of
from harness.store.store import Store

from .. import environment_data, figures, kept, page, queries, tables
from ..boards import board
from ..pareto_charts import Axis, pareto, pareto_front
from ..queries import Column, Filters

__all__ = ["render"]

_MOST_MODELS = 6
_MOST_LISTED = 100
_MOST_NAMED = 20
_ASPECTS = ("quality", "latency", "throughput", "memory", "energy", "cost to compress", "other")
_NOTHING = "nothing"
_IN_ITS_NAME = "limit of items"  # a figure of its own says so


def render() -> None:
    """Draw the page."""
    st.title("Pareto")
    with page.opened() as store:
        sweep = page.ask_sweep(store)
        filters = page.ask_filters(store, sweep)
        offered = [column for column in kept.columns(store, sweep) if column.direction is not None]
        models = _ask_models(offered, filters, kept.options(store, sweep).models)
        if not models:
            st.info("Choose at least one model.")
            return
        offered = queries.of_models(offered, models, filters.tasks)
        if len(offered) < 2:
            st.info("A front needs two figures: a sweep with `--tasks` and with timed shapes measures them.")
            return
        if not any(column.kind == "task" for column in offered):
            st.caption("Models with random weights have no quality; costs can be held against each other.")
        columns, axes = _ask_axes(offered)
        _draw(store, models, filters, sweep, columns, axes)


def _ask_models(offered: Sequence[Column], filters: Filters, models: Sequence[str]) -> list[str]:
    """One figure a model: a front over several would only say that small models are small."""
    wanted = [model for model in models if not filters.models or model in filters.models]
    kinds: dict[str, set[str]] = {model: set() for model in wanted}
    for column in offered:
        for model in column.models & kinds.keys():
            kinds[model].add(column.kind)
    # Those with quality and cost first.
    ordered = sorted(wanted, key=lambda model: (not {"task", "scenario"} <= kinds[model], model))
    return page.choose_many(
        f"Models (up to {_MOST_MODELS}), a figure each",
        ordered,
        "on",
        default=ordered[:1],
        max_selections=_MOST_MODELS,
    )


def _ask_axes(offered: Sequence[Column]) -> tuple[list[Column], list[Axis]]:
    """The columns of the axes x, y and perhaps z, and how each is drawn."""
    by_name = {column.name: column for column in sorted(offered, key=_by_aspect)}
    quality = [name for name, column in by_name.items() if column.kind == "task"]
    costs = [name for name, column in by_name.items() if column.kind != "task"]
    costs.sort(key=[column.name for column in offered].index)  # the leading metric first

    def shown(name: str) -> str:
        return name if name == _NOTHING else f"{by_name[name].aspect}: {name}"

    left, middle, right = st.columns(3)
    y = str(page.choose_one("Vertical", [*quality, *costs], "quality", left, format_func=shown))
    rest = [name for name in [*costs, *quality] if name != y]
    x = str(page.choose_one("Horizontal", rest, "cost", middle, format_func=shown))
    others = [_NOTHING, *(name for name in [*costs, *quality] if name not in (x, y))]
    z = str(
        page.choose_one(
            "Area of the points",
            others,
            "third",
            right,
            format_func=shown,
            help="A third figure: the front is then that of all three.",
        )
    )
    chosen = [x, y] if z == _NOTHING else [x, y, z]
    columns = [by_name[name] for name in chosen]
    switches = st.columns(3)
    logs = [
        page.ask_flag(f"{what} logarithmic", f"log_{axis}", place)
        for axis, what, place in zip(
            "xyz", ("Horizontal", "Vertical", "Area"), (switches[1], switches[0], switches[2]), strict=True
        )
        if axis != "z" or z != _NOTHING
    ]
    axes = [
        Axis(column.name, column.unit, str(column.direction), is_log)
        for column, is_log in zip(columns, logs, strict=True)
    ]
    return columns, axes


def _by_aspect(column: Column) -> int:
    return _ASPECTS.index(column.aspect)


def _draw(
    store: Store,
    models: Sequence[str],
    filters: Filters,
    sweep: int | None,
    columns: Sequence[Column],
    axes: Sequence[Axis],
) -> None:
    places = st.columns(2) if len(models) > 1 else [st.container()]
    fronts, without, apart, hollow = [], [], [], False
    for number, model in enumerate(models):
        points = _points(store, model, filters, sweep, columns)
        if points.empty:
            without.append(model)
            continue
        place = places[(number - len(without)) % len(places)]
        if len(models) > 1:
            place.text(model)
        figure = pareto(points, *axes, height=560 if len(models) == 1 else 440)
        figures.show_figure(figure, f"front {model}", place, alt=_in_words(points, axes))
        off_axis = figure.layout.meta["off_axis"]
        if left_out := figure.layout.meta["left_out"]:
            drawn = len(points) - left_out - len(off_axis)
            place.caption(
                f"{drawn:,} of {len(points):,} variants are drawn: all on the front, and of those that "
                "are beaten as many as can be told apart."
            )
        _say_off_axis(off_axis, place)
        apart.append(_not_alike(store, model, points, columns))
        hollow = hollow or bool(points["marks"].astype(bool).any())
        front = points[pareto_front(points, _better(axes))]
        fronts.append(front.sort_values("x", ascending=axes[0].direction == "lower"))
    for model in without:
        st.text(f"{model}: no variant that passes the filters has all of these figures.")
    if not fronts:
        st.info("No variant has all of these figures.")
        return
    if hollow:
        st.caption(
            "Hollow: *simulated*, the arithmetic of the method without a kernel that makes it "
            "fast or small; *synthetic*, random weights."
        )
    _flag(pd.concat(apart, ignore_index=True))
    _draw_front(store, pd.concat(fronts, ignore_index=True), columns, sweep)


def _say_off_axis(names: Sequence[str], place: Any) -> None:
    """Those without a place on an axis, in plain text; zero is often the best that there is."""
    if names:
        more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
        place.text(
            "Not drawn, because a logarithmic axis has no zero and nothing below, and no axis infinity: "
            f"{', '.join(names[:_MOST_NAMED])}{more}"
        )


def _points(
    store: Store, model: str, filters: Filters, sweep: int | None, columns: Sequence[Column]
) -> pd.DataFrame:
    found = queries.points(store, columns, queries.only_model(filters, model), sweep)
    about = queries.described(store, found["variant"].tolist())
    return found.merge(about, on="variant")


def _not_alike(store: Store, model: str, points: pd.DataFrame, columns: Sequence[Column]) -> pd.DataFrame:
    """Under what different conditions the points of a model were measured: one row a figure and condition."""
    parts = []
    for axis, column in zip("xyz", columns, strict=False):
        sweeps = queries.sweeps_of(store, points[f"{axis}_cell"])
        scope = scope_of(column.kind, column.unit, column.metric)
        found = environment_data.comparability_warnings(store, sweeps, [scope])
        parts.append(found[found["what"] != _IN_ITS_NAME].assign(model=model, figure=column.name))
    return pd.concat(parts, ignore_index=True)[["model", "figure", "what", "values", "meaning"]]


def _flag(found: pd.DataFrame) -> None:
    if found.empty:
        return
    st.warning(
        "Not all of these variants were measured under the same conditions, so that one may beat another by "
        "these alone; filter by device or choose a sweep in the side bar."
    )
    with st.expander("In what they differ"):
        tables.show_table(found, "conditions")


def _better(axes: Sequence[Axis]) -> dict[str, str]:
    return {axis: about.direction for axis, about in zip("xyz", axes, strict=False)}


def _in_words(points: pd.DataFrame, axes: Sequence[Axis]) -> str:
    best = points[pareto_front(points, _better(axes))].sort_values("x")["name"].tolist()
    against = " against ".join(axis.name for axis in axes[:2][::-1])
    return f"{against} of {len(points)} variants; on the front: {', '.join(best[:20])}"


def _draw_front(store: Store, front: pd.DataFrame, columns: Sequence[Column], sweep: int | None) -> None:
    st.subheader("On the front")
    if len(front) > _MOST_LISTED:
        st.caption(f"The first {_MOST_LISTED} of {len(front):,}.")
    ids = front["variant"].tolist()[:_MOST_LISTED]
    about = queries.described(store, ids)
    values = queries.values(store, columns, sweep, ids)
    ended = kept.how_cells_ended(store, sweep)
    tables.show_table(board(about, ended, values, columns).table, "front")
