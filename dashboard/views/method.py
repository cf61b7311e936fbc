"""One method: what its plugin says, its knobs, who used it, and what it cost in quality."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from harness.display import scale
from harness.errors import HarnessError
from harness.store.store import Store

from .. import figures, method_charts, method_data, page, tables
from ..method_catalogue import Catalogue, MethodCard, card_parts, read_catalogue
from ..queries import marks_text

__all__ = ["render"]

_PARTS = {"": "Claim", "Changes": "What it changes", "Hurts": "When it hurts"}


def render() -> None:
    """Draw the page."""
    st.title("Method")
    catalogue = _installed()
    with page.opened() as store:
        sweep = page.ask_sweep(store)
        used = method_data.used_methods(store).set_index("name")
        # Those with rows first, so that the page begins with something to see.
        names = [*(name for name in used.index if name != "baseline"), *sorted(catalogue.methods)]
        names = list(dict.fromkeys([*names, *used.index]))
        if not names:
            page.how_to_fill("The store has no results yet.")
            return

        def shown(name: str) -> str:
            marks = ["not installed here"] * (name not in catalogue.methods)
            marks += ["no rows"] * (name not in used.index)
            return f"{name} ({', '.join(marks)})" if marks else name

        name = page.choose_one("Method", names, "name", format_func=shown)
        assert name is not None
        card = catalogue.methods.get(name)
        if card is None:
            st.info(
                "No plugin that is installed here has this method, so it has no card. "
                "`harness plugins` lists what is installed, and what is broken."
            )
        else:
            _draw_card(card)
        if name in used.index:
            _draw_rows(store, name, list(used.at[name, "ids"]), sweep)
        else:
            st.subheader("Rows")
            st.info("Nothing in this store was made with it. A sweep would measure it:")
            st.code(f"harness sweep --methods {name}", language="bash")


# --- the card ---------------------------------------------------------------------------------


@st.cache_resource(show_spinner="Reading what the plugins say about their methods …")
def _read_once() -> Catalogue:
    return read_catalogue()


def _installed() -> Catalogue:
    try:
        catalogue = _read_once()
    except HarnessError as error:
        st.error("The plugins could not be read, so there are no cards; the rows are shown all the same.")
        st.text(str(error))
        return Catalogue()
    if catalogue.broken:
        with st.expander(f"{len(catalogue.broken)} plugins are broken"):
            rows = [(each.name, each.error) for each in catalogue.broken]
            tables.show_table(pd.DataFrame(rows, columns=["plugin", "error"]), "broken")
    return catalogue


def _draw_card(card: MethodCard) -> None:
    needs = "depends on the options" if card.needs is None else ", ".join(card.needs) or "nothing"
    st.text(f"{card.family} · needs: {needs}")
    for title, text in card_parts(card.card):
        if title == "Paper" and card.paper:
            continue  # the citation below says the same
        st.markdown(f"**{_PARTS.get(title, title)}**")  # one of our own words
        st.text(_sentence(text))
    if card.paper:
        st.markdown("**Paper**")
        st.text(card.paper)
        if card.arxiv:
            st.link_button(f"arXiv:{card.arxiv}", f"https://arxiv.org/abs/{card.arxiv}")
    st.subheader("Options")
    if not card.options:
        st.text("It has none.")
        return
    rows = [(o.name, o.type, o.range, o.default, o.aliases, o.meaning) for o in card.options]
    columns = ["option", "type", "range", "default", "also accepted as", "meaning"]
    tables.show_table(pd.DataFrame(rows, columns=columns, dtype=object), "options")
    given = next((o for o in card.options if o.default not in ("none", "must be given")), card.options[0])
    st.caption("An option is written behind the name:")
    st.code(f"harness sweep --methods {card.name}:{given.name}={given.default}", language="bash")


def _sentence(text: str) -> str:
    """Paragraphs without the line breaks of their source: the browser breaks lines."""
    joined = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return joined[:1].upper() + joined[1:]


# --- rows -------------------------------------------------------------------------------------


def _draw_rows(store: Store, name: str, ids: list[int], sweep: int | None) -> None:
    if len(ids) > method_data.MOST_VARIANTS:
        st.caption(f"The newest {method_data.MOST_VARIANTS:,} of {len(ids):,} variants.")
        ids = ids[-method_data.MOST_VARIANTS :]
    about = method_data.variants_with(store, ids, sweep)
    st.subheader("Quality against what is stored")
    if about.empty:
        st.info("This sweep has no rows of this method; choose another in the side bar.")
        return
    models = page.choose_many("Models", sorted(set(about["model"])), "model")
    if models:
        about = about[about["model"].isin(models)]
    compared = _draw_quality(store, name, about, sweep)
    st.subheader("Rows")
    if len(about) > method_data.MOST_ROWS:
        st.caption(
            f"The newest {method_data.MOST_ROWS} of {len(about):,} variants; choose a model for fewer."
        )
    tables.show_table(_variant_table(about.iloc[::-1].head(method_data.MOST_ROWS), compared), f"{name} rows")
    place = page.choose_one(
        "All results at", method_data.places_of(store, about["variant"].tolist(), sweep), "at",
        help="The task or the shape (batch size, prompt length, new tokens) of the cells.",
    )  # fmt: skip
    if place is not None:
        found, total = method_data.results_at(store, about, place, sweep)
        if len(found) < total:
            st.caption(f"The newest {len(found):,} of {total:,} results.")
        tables.show_table(found, f"{name} at {place}")


def _draw_quality(store: Store, name: str, about: pd.DataFrame, sweep: int | None) -> pd.DataFrame | None:
    """The chart with its choices; returns what was compared."""
    metrics = method_data.quality_metrics(store, about["variant"].tolist(), sweep)
    if metrics.empty:
        st.info("No quality was measured: a sweep with `--tasks` does. Models with random weights have none.")
        return None
    by_name = {f"{row.metric} · {row.task}": (row.task, row.metric) for row in metrics.itertuples()}
    left, right = st.columns(2)
    quality = page.choose_one("Quality", list(by_name), "score", left)
    costs = [name for name in method_charts.COSTS if about[name].notna().any()]
    if about["sparsity"].max() > about["sparsity"].min():
        costs.reverse()  # a pruning method is drawn over its sparsity at first
    cost = page.choose_one(
        "Against", costs, "stored", right, format_func=lambda each: method_charts.COSTS[each][0],
        help="A mean over the modules that the method changed, weighted by their parameters. Bits count "
        "scales, zero points and indices.",
    )  # fmt: skip
    assert quality is not None
    task, metric = by_name[quality]
    compared = method_data.against_baseline(store, about, task, metric, sweep)
    if cost is None:
        st.info("What the transforms stored was not measured.")
        return compared
    rows = compared.merge(about, on="variant")
    rows = rows[rows[cost].notna() & rows["difference"].notna()]
    if rows.empty:
        st.info("There is no baseline with this score; `harness sweep` measures one by itself.")
        return compared
    models = rows["model"].value_counts().index.tolist()
    if len(models) > method_charts.MOST_MODELS:
        st.caption(
            f"{method_charts.MOST_MODELS} of {len(models)} models, those with the most variants: "
            "the table below has all."
        )
    rows = rows[rows["model"].isin(models[: method_charts.MOST_MODELS])]
    figure = method_charts.quality_against(rows, cost, quality)
    figures.show_figure(figure, f"{name} {quality} over {cost}")
    st.caption(
        "The line at zero is the baseline. Hollow: *simulated*. *Item by item*: a paired difference over the "
        "same items; *by intervals*: the two intervals combined as if they were independent."
    )
    return compared


def _variant_table(about: pd.DataFrame, compared: pd.DataFrame | None) -> pd.DataFrame:
    marks = [
        marks_text(simulated=simulated is True, synthetic=bool(synthetic), imported=isinstance(origin, str))
        for simulated, synthetic, origin in zip(
            about["simulated"], about["synthetic"], about["origin"], strict=True
        )
    ]
    table = pd.DataFrame(
        {
            "id": about["variant"],
            "model": about["model"],
            "method": about["method"],
            "marks": marks,
            "bits per weight": about["bits"],
            "sparsity [%]": about["sparsity"] * 100,
            "cells ok": about["ok"],
            "cells not ok": about["not_ok"],
            "options": about["options"],
            "dtype": about["dtype"],
            "device": about["device_name"],
            "seed": about["seed"],
            "imported from": about["origin"].where(about["origin"].notna(), ""),
        }
    )
    if compared is None or compared.empty:
        return table.drop(columns="id")
    factor, unit = scale(str(compared["unit"].iloc[0]), compared["difference"])
    step = "points" if unit == "%" else unit
    arrow = {"lower": " ↓", "higher": " ↑"}.get(str(compared["direction"].iloc[0]), "")
    heading = f"difference{arrow} [{step}]" if step else f"difference{arrow}"
    found = pd.DataFrame(
        {
            "id": compared["variant"],
            heading: compared["difference"] * factor,
            "95 % from": compared["lower"] * factor,
            "95 % to": compared["upper"] * factor,
            f"value [{unit}]" if unit else "value": compared["value"] * factor,
            "compared": compared["compared"],
            "caution": compared["caution"],
        }
    )
    merged = table.merge(found, on="id", how="left").drop(columns="id")
    texts = ["compared", "caution"]
    merged[texts] = merged[texts].astype(object).where(merged[texts].notna(), "")
    leading = ["model", "method", "marks", *[name for name in found if name != "id"]]
    return merged[[*leading, *[name for name in table if name not in leading and name != "id"]]]
