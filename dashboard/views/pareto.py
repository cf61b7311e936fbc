"""Quality against cost, with the variants that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import streamlit as st

from harness.display import ASPECTS, aspect_of
from harness.store.store import Store

from .. import kept, page, queries, tables
from ..boards import board
from ..pareto_charts import Axis, pareto, pareto_front
from ..queries import Column, Filters

__all__ = ["render"]

_MOST_MODELS = 6
_MOST_LISTED = 100
_NOTHING = "nothing"


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
        quality = [column for column in offered if column.kind == "task"]
        cost = [column for column in offered if column.kind != "task"]
        if not quality or not cost:
            st.info(
                "A front needs a quality and a cost: a sweep with `--tasks` and with timed shapes. "
                "Models with random weights have no quality."
            )
            return
        columns, axes = _ask_axes(quality, cost, offered)
        drawn = [
            model for model in models if _draw_model(store, model, filters, sweep, columns, axes, len(models))
        ]
        if not drawn:
            st.info("No variant has all of these figures.")
