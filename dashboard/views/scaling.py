"""How time and memory grow with the prompt and with the batch, and where two variants cost the same."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from harness.comparing.crossings import Crossing
from harness.comparing.growth import MIN_SIZES, Axis

from .. import figures, page, scaling_charts, scaling_data, tables
from ..scaling_data import Timed
from ..variant_names import marked_names

__all__ = ["render"]

_MOST = 6
_TITLES = {Axis.PROMPT_LEN: "Against the prompt length", Axis.BATCH_SIZE: "Against the batch size"}
_SIZES = {Axis.PROMPT_LEN: "prompt lengths", Axis.BATCH_SIZE: "batch sizes"}


def render() -> None:
    """Draw the page."""
    st.title("Scaling")
    with page.opened() as store:
        sweep = page.ask_sweep(store)
        model = page.choose_one("Model", scaling_data.timed_models(store, sweep), "on")
        if model is None:
            page.how_to_fill("Nothing was timed yet.")
            return
        shapes = scaling_data.timed_shapes(store, model, sweep)
        about = scaling_data.timed_variants(store, model, shapes)
        if about.empty:
            page.how_to_fill("No shape of this model was timed.")
            return
        names = marked_names(about)
        chosen = page.choose_many(
            f"Variants (up to {_MOST})",
            [str(variant) for variant in names],
            "line",
            default=[str(variant) for variant in scaling_data.first_choice(about, 4)],
            max_selections=_MOST,
            format_func=lambda variant: names[int(variant)],
        )
        if not chosen:
            st.info("Choose at least one variant.")
            return
        ids = [int(variant) for variant in chosen]
        left, right = st.columns(2)
        time = page.choose_one("Time", scaling_data.TIMES, "time", left, help=_TIME_HELP)
        memory = page.choose_one("Memory", scaling_data.BYTES, "memory", right, help=_MEMORY_HELP)
        assert time is not None
        assert memory is not None
        pair = _ask_pair(about, ids)
        timed = scaling_data.read_timed(store, list(dict.fromkeys([*ids, *pair])), sweep)
        for axis in Axis:
            _draw_axis(axis, model, about, ids, shapes, timed, [time, memory])
        _draw_crossings(timed, about, pair, time, model, shapes)


_TIME_HELP = (
    "prefill_latency: the whole prompt at once, until the first token. decode_latency: each token after it. "
    "end_to_end_latency: both together. Lower is better."
)
_MEMORY_HELP = (
    "prefill_peak_bytes: the most that was allocated while the prompt was read, weights included. "
    "prefill_activation_bytes and prefill_kv_cache_bytes: what of it the activations and the cache of keys "
    "and values took. Lower is better."
)


# --- growth -----------------------------------------------------------------------------------


def _draw_axis(
    axis: Axis,
    model: str,
    about: pd.DataFrame,
    ids: Sequence[int],
    shapes: pd.DataFrame,
    timed: Timed,
    metrics: Sequence[str],
) -> None:
    st.subheader(_TITLES[axis])
    held = _ask_held(axis, scaling_data.held_sizes(shapes, ids, axis))
    if held is None:
        st.info("The chosen variants were not timed.")
        return
    chosen = Timed({variant: timed.cells[variant] for variant in ids})
    lines = scaling_data.growth_of(chosen, axis, held, metrics)
    fits = scaling_data.fits(lines, about, metrics)
    for place, metric in zip(st.columns(2), metrics, strict=True):
        points = scaling_data.points(lines, about, metric)
        if points.empty:
            place.info(f"No {metric} was measured at these shapes.")
            continue
        figure = scaling_charts.growth(points, fits, axis, metric)
        figures.show_figure(figure, f"{metric} over {axis}", place)
    if fits["exponent"].notna().any():
        st.caption(
            f"Thin lines are power laws, cost ~ size ^ exponent, fitted over at least {MIN_SIZES} sizes. "
            "1 is linear, 2 quadratic; 0 does not grow. The interval covers the noise of the readings. "
            "Local exponents, between neighbouring sizes, say whether a power law fits at all: where "
            "overhead dominates the small sizes they rise along the line."
        )
    if not fits.empty:
        tables.show_table(_fit_table(fits), f"exponents over {axis}")
    enough = set(fits.loc[fits["sizes"] >= MIN_SIZES, "variant"])
    if lacking := [variant for variant in ids if variant not in enough]:
        methods = about.loc[about["variant"].isin(lacking), "method"].drop_duplicates().tolist()
        mine = shapes[shapes["variant"].isin(ids)]
        st.write(f"An exponent needs {MIN_SIZES} {_SIZES[axis]}; this sweep would measure them:")
        command = scaling_data.missing_sizes_command(model, methods, mine, axis)
        st.code(command, language="bash", wrap_lines=True)


def _ask_held(axis: Axis, options: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    what, key = ("batch size", "batch") if axis is Axis.PROMPT_LEN else ("prompt length", "prompt")
    by_name = {f"{fixed}-{new}": (fixed, new) for fixed, new in options}
    name = page.choose_one(
        f"At {what}",
        list(by_name),
        key,
        format_func=lambda each: f"{what} {by_name[each][0]:,}, {by_name[each][1]:,} new tokens",
    )
    return None if name is None else by_name[name]


def _fit_table(fits: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": fits["name"],
            "metric": fits["metric"],
            "exponent": fits["exponent"],
            "95 % from": fits["lower"],
            "95 % to": fits["upper"],
            "from size": fits["first"],
            "to size": fits["last"],
            "sizes": fits["sizes"],
            "local exponents": fits["local"],
            "mode": fits["mode"].fillna(""),
            "basis": fits["basis"],
            "caution": fits["note"],
        }
    )


# --- crossings --------------------------------------------------------------------------------


def _ask_pair(about: pd.DataFrame, ids: Sequence[int]) -> list[int]:
    """Which two are set against each other; fewer where the model has no two variants."""
    names = marked_names(about)
    # What is drawn above comes first.
    ordered = [*ids, *(int(variant) for variant in names if variant not in ids)]
    if len(ordered) < 2:
        return []
    left, right = st.columns(2)

    def shown(variant: str) -> str:
        return names[int(variant)]

    a = page.choose_one(
        "Where they cross: this one", [str(each) for each in ordered], "a", left, format_func=shown
    )
    rest = [str(each) for each in ordered if str(each) != a]
    b = page.choose_one("and this one", rest, "b", right, format_func=shown)
    assert a is not None
    assert b is not None
    return [int(a), int(b)]


def _draw_crossings(
    timed: Timed,
    about: pd.DataFrame,
    pair: Sequence[int],
    time: str,
    model: str,
    shapes: pd.DataFrame,
) -> None:
    st.subheader("Where two variants cost the same")
    if not pair:
        st.info("A crossing needs two variants of this model.")
        return
    a, b = pair
    rows = about.set_index("variant")
    names = marked_names(about)
    name_a, name_b = names[a], names[b]
    crossed = {axis: scaling_data.crossings_of(timed, a, b, axis, time) for axis in Axis}
    for place, (axis, found) in zip(st.columns(2), crossed.items(), strict=True):
        with place:
            _draw_crossing(found, name_a, name_b, axis)
            if not found:
                methods = list(dict.fromkeys([str(rows.at[a, "method"]), str(rows.at[b, "method"])]))
                mine = shapes[shapes["variant"].isin(pair)]
                command = scaling_data.missing_sizes_command(model, methods, mine, axis)
                st.code(command, language="bash", wrap_lines=True)
    for axis, found in crossed.items():
        if found:
            tables.show_table(scaling_data.crossing_table(found, name_b), f"crossings over {axis}")


def _draw_crossing(found: Sequence[Crossing], name_a: str, name_b: str, axis: Axis) -> None:
    st.markdown(
        "**Crossover length**" if axis is Axis.PROMPT_LEN else "**Break-even batch size**",
        help="The size at which both take the same time, by interpolation between measured sizes "
        "(in logarithms), with its 95 % interval.",
    )
    if not found:
        st.info(f"The two were not both timed at two {_SIZES[axis]}, everything else alike: sweep both.")
        return
    held = list(dict.fromkeys((each.fixed, each.new_tokens) for each in found))
    key = "at_batch" if axis is Axis.PROMPT_LEN else "at_prompt"
    what = "batch size" if axis is Axis.PROMPT_LEN else "prompt length"
    by_name = {f"{fixed}-{new}": (fixed, new) for fixed, new in held}
    name = page.choose_one(
        "At",
        list(by_name),
        key,
        format_func=lambda each: f"{what} {by_name[each][0]:,}, {by_name[each][1]:,} new tokens",
    )
    drawn = [each for each in found if name and (each.fixed, each.new_tokens) == by_name[name]]
    if any(each.differences for each in drawn):
        st.warning("The two were measured under different conditions: see the column caution.")
    for each in drawn:
        st.text(scaling_data.crossing_sentence(each, name_b))
    figures.show_figure(scaling_charts.ratios(drawn, name_a, name_b), f"crossing over {axis}")
