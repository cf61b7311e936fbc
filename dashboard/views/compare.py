"""A few variants side by side: figures, tests, words, items that changed, readings, kernels, options."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import streamlit as st

from harness.store.store import Store
from harness.why import Explanation

from .. import charts, detail_charts, figures, kept, page, queries, tables
from ..boards import HOW_COMPARED, difference_table, value_table
from ..queries import Column, Filters
from ..variant_names import marked_names

__all__ = ["render"]

_FEWEST, _MOST = 2, 6
_OFFERED = 200
_ITEMS_LISTED = 500


@dataclass(frozen=True)
class _Chosen:
    """The variants of the page, the first of which is what the others are compared with."""

    store: Store
    sweep: int | None
    about: pd.DataFrame  # `queries.described`

    @property
    def ids(self) -> list[int]:
        return [int(variant) for variant in self.about["variant"]]

    @property
    def names(self) -> dict[int, str]:
        return dict(zip(self.ids, self.about["name"], strict=True))


def render() -> None:
    """Draw the page."""
    st.title("Compare")
    with page.opened() as store:
        sweep = page.ask_sweep(store)
        filters = page.ask_filters(store, sweep)
        ids = _ask_variants(store, filters, sweep)
        if len(ids) < _FEWEST:
            st.info(f"Choose at least {_FEWEST} variants.")
            return
        chosen = _Chosen(store, sweep, queries.described(store, ids))
        offered = queries.of_models(kept.columns(store, sweep), set(chosen.about["model"]), filters.tasks)
        values = queries.everything(store, offered, sweep, ids)
        have = values.groupby("column")["variant"].nunique()
        columns = [column for column in offered if have.get(column.name, 0) >= 1]
        shape, explained = _ask_shape(chosen)
        _draw_words(chosen, explained)
        _draw_figures(chosen, columns, values)
        _draw_items(chosen)
        _draw_readings(chosen, columns, values)
        _draw_kernels(chosen, shape, explained)
        _draw_everything(chosen, columns, values)
        _draw_options(chosen)


def _ask_variants(store: Store, filters: Filters, sweep: int | None) -> list[int]:
    matching = queries.matching(store, filters, sweep)
    first = matching[:_OFFERED]
    # What was chosen stays, also where the list has become too long for it or a filter hides it.
    known = set(queries.matching(store, Filters(), sweep))
    wanted = page.chosen_before("variant") or []
    kept_ids = [int(each) for each in wanted if each.isdecimal() and int(each) in known]
    about = queries.described(store, list(dict.fromkeys([*kept_ids, *first])))
    names = dict(zip(about["variant"], about["name"], strict=True))
    default = _first_choice(store, about[about["variant"].isin(first)], sweep)
    missing = [variant for variant in default if variant not in names]
    if missing:  # a baseline that a filter hides
        about = pd.concat([about, queries.described(store, missing)], ignore_index=True)
        names = dict(zip(about["variant"], queries.named(about)["name"], strict=True))
    chosen = page.choose_many(
        f"Variants ({_FEWEST} to {_MOST}); the first is what the others are compared with",
        [str(variant) for variant in names],
        "variant",
        default=[str(variant) for variant in default],
        max_selections=_MOST,
        format_func=lambda variant: names[int(variant)],
    )
    if len(matching) > _OFFERED:
        st.caption(
            f"The newest {_OFFERED} of {len(matching):,} variants are offered; search or filter in the side "
            "bar to find others. What is chosen stays."
        )
    return [int(variant) for variant in chosen]


def _first_choice(store: Store, about: pd.DataFrame, sweep: int | None) -> list[int]:
    """The baseline with the most companions, and those of them of which most was measured."""
    pairs = queries.baselines(store, about, sweep)
    if not pairs:
        return [int(variant) for variant in about["variant"][:_FEWEST]]
    baseline = Counter(pairs.values()).most_common(1)[0][0]
    ended = kept.how_cells_ended(store, sweep)
    good = ended[ended["status"] == "ok"].set_index("variant")["cells"]
    others = [variant for variant, of in pairs.items() if of == baseline and variant in good.index]
    others.sort(key=lambda variant: (-good[variant], variant))
    return [baseline, *others[:3]]


def _ask_shape(chosen: _Chosen) -> tuple[str | None, dict[int, Explanation]]:
    """The shape that words and kernels are about, with what the store knows of it."""
    shapes = queries.shapes(chosen.store, chosen.ids, chosen.sweep)
    shape = page.choose_one("Shape, for words and kernels", shapes, "shape")
    if shape is None:
        return None, {}
    return shape, queries.explanations(chosen.store, chosen.ids, shape, chosen.sweep)


def _draw_words(chosen: _Chosen, explained: Mapping[int, Explanation]) -> None:
    """What the sweeps themselves concluded."""
    said = {variant: each.verdict for variant, each in explained.items() if each.verdict}
    if said:
        st.subheader("In words")
    names = marked_names(chosen.about)
    for variant, verdict in said.items():
        st.text(f"{names[variant]}: {verdict}")


def _draw_figures(chosen: _Chosen, columns: Sequence[Column], values: pd.DataFrame) -> None:
    st.subheader("Figures")
    have = values.groupby("column")["variant"].nunique()
    shared = [column for column in columns if have[column.name] >= _FEWEST]
    by_name = {column.name: column for column in shared}
    names = page.choose_many("Figures", list(by_name), "figure", default=queries.leading(shared))
    known = values.merge(chosen.about, on="variant")
    places = st.columns(2)
    for number, name in enumerate(names):
        column = by_name[name]
        rows = known[known["column"] == name].assign(metric=column.metric, unit=column.unit, kind=column.kind)
        figure = charts.comparison(rows, list(chosen.names.values()))
        figures.show_figure(figure, name, places[number % 2])
    st.subheader("Against the first")
    pairs = dict.fromkeys(chosen.ids[1:], chosen.ids[0])
    wanted = [by_name[name] for name in names]
    if page.ask_flag(
        "Test every figure",
        "every",
        help="All figures and not only those above; p-values are adjusted for all of them. Takes seconds.",
    ):
        wanted = shared
    found = queries.differences(chosen.store, wanted, values, pairs, chosen.about)
    if found.empty:
        st.info("The first variant has none of these figures.")
        return
    st.caption(HOW_COMPARED)
    tables.show_table(difference_table(found, marked_names(chosen.about)), "differences")


def _draw_items(chosen: _Chosen) -> None:
    st.subheader("Items that changed")
    first, names = chosen.ids[0], chosen.names
    left, right = st.columns(2)
    other = page.choose_one(
        "Compared with the first",
        [str(variant) for variant in chosen.ids[1:]],
        "other",
        left,
        format_func=lambda variant: names[int(variant)],
    )
    places = queries.item_places(chosen.store, first, int(str(other)), chosen.sweep)
    if not places:
        st.info("The two have no task in common whose single items are stored.")
        return
    place = str(page.choose_one("Score of single items", list(places), "items", right))
    a, b, metric = places[place]
    found = queries.changed_items(chosen.store, a, b, metric, _ITEMS_LISTED)
    share = found.changed / found.items if found.items else 0.0
    st.caption(
        f"{found.changed:,} of {found.items:,} items changed ({share:.1%}), those that changed most first."
    )
    if found.rows.empty:
        return
    if found.changed > len(found.rows):
        st.caption(f"The first {len(found.rows):,} are listed.")
    tables.show_table(found.rows.rename(columns={"index": "item"}), "items")
    _draw_item(chosen, (a, b), metric, found.rows["index"].tolist(), int(str(other)))


def _draw_item(
    chosen: _Chosen, pair: tuple[int, int], metric: str, indices: Sequence[int], other: int
) -> None:
    index = int(str(page.choose_one("Item", [str(index) for index in indices], "item")))
    for place, cell, variant in zip(st.columns(2), pair, (chosen.ids[0], other), strict=True):
        outcome, detail = queries.item_detail(chosen.store, cell, metric, index)
        place.text(f"{chosen.names[variant]}: {metric} {charts.format_value(outcome)}")
        told = json.dumps(detail, indent=1, ensure_ascii=False, default=str)
        place.code(told if detail else "Nothing more was kept of this item.", language=None, wrap_lines=True)


def _draw_readings(chosen: _Chosen, columns: Sequence[Column], values: pd.DataFrame) -> None:
    st.subheader("Raw readings")
    sampled = queries.has_readings(chosen.store, values["record"])
    having = set(values.loc[values["record"].isin(sampled), "column"])
    by_name = {column.name: column for column in columns if column.name in having}
    if not by_name:
        st.info("No raw readings are stored of these variants.")
        return
    leading = [name for name in queries.leading(by_name.values()) if name in by_name]
    options = list(dict.fromkeys([*leading, *by_name]))
    name = str(page.choose_one("Readings of", options, "readings"))
    mine = values[(values["column"] == name) & values["record"].isin(sampled)]
    found = queries.readings(chosen.store, mine)
    about = chosen.about[chosen.about["variant"].isin(found["variant"])]
    figures.show_figure(
        detail_charts.distributions(found, by_name[name], about),
        f"readings {name}",
        alt=f"Every reading of {name}, with a box from the first to the third quartile for each variant",
    )


def _draw_kernels(chosen: _Chosen, shape: str | None, found: Mapping[int, Explanation]) -> None:
    st.subheader("Kernels and the device's ceilings")
    if shape is None:
        st.info("The variants were not timed in one shape.")
        return
    drawn = [
        (f"kernels {phase}", detail_charts.kernel_shares(found, chosen.names, phase))
        for phase in ("prefill", "decode")
    ]
    drawn.append(("ceilings", detail_charts.ceilings(found, chosen.about)))
    shown = [(name, figure) for name, figure in drawn if figure is not None]
    if not shown:
        st.info(f"No kernels were recorded in {shape}.")
        return
    places = st.columns(2)
    for number, (name, figure) in enumerate(shown):
        figures.show_figure(figure, name, places[number % 2])


def _draw_everything(chosen: _Chosen, columns: Sequence[Column], values: pd.DataFrame) -> None:
    st.subheader("Every figure")
    about = chosen.about.assign(name=list(marked_names(chosen.about).values()))
    tables.show_table(value_table(values, columns, about), "figures")


def _draw_options(chosen: _Chosen) -> None:
    st.subheader("Options")
    tables.show_table(queries.option_table(chosen.about), "options", index=True)
    st.subheader("What the transforms changed")
    changed = queries.changes(chosen.store, chosen.ids)
    tables.show_table(
        pd.DataFrame(
            {
                "variant": list(chosen.names.values()),
                "modules": changed["modules"],
                "changed": changed["modules_changed"],
                "MiB before": changed["bytes_before"] / 2**20,
                "MiB after": changed["bytes_after"] / 2**20,
                "after / before": changed["bytes_after"] / changed["bytes_before"],
                "simulated": [
                    {True: "yes", False: "no"}.get(simulated, "not known")
                    for simulated in changed["simulated"]
                ],
            }
        ),
        "changes",
    )
