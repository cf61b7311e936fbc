"""What the pages show: a store in, DataFrames out. No Streamlit, no Plotly.

==============  ====================================================================================
`scope`         which cells and variants are meant: current or a sweep's, filters, what they offer
`columns`       what can be shown and compared, by the store's catalogue
`values`        the readings of columns, of one page of variants or of all as points
`variants`      what a variant is, pages of them, their baselines, how their cells ended
`compared`      variants against another: differences, intervals, tests
`details`       raw readings, items that changed, kernels
==============  ====================================================================================

Nothing here reads all records: conditions, order and page go into the query, and tests look at the plans.
"""

from __future__ import annotations

from .columns import Column, columns, leading, of_models
from .compared import differences
from .details import (
    changed_items,
    explanations,
    has_readings,
    histograms,
    item_detail,
    item_places,
    readings,
    shapes,
)
from .scope import Filters, Options, Stamp, is_empty, only_model, options, stamp, sweep_ids
from .values import everything, histories, points, sweeps_of, values
from .variants import (
    baselines,
    changes,
    described,
    how_cells_ended,
    knobs_text,
    marks_text,
    matching,
    named,
    option_table,
    shown,
)

__all__ = [
    "Column",
    "Filters",
    "Options",
    "Stamp",
    "baselines",
    "changed_items",
    "changes",
    "columns",
    "described",
    "differences",
    "everything",
    "explanations",
    "has_readings",
    "histograms",
    "histories",
    "how_cells_ended",
    "is_empty",
    "item_detail",
    "item_places",
    "knobs_text",
    "leading",
    "marks_text",
    "matching",
    "named",
    "of_models",
    "only_model",
    "option_table",
    "options",
    "points",
    "readings",
    "shapes",
    "shown",
    "stamp",
    "sweep_ids",
    "sweeps_of",
    "values",
]
