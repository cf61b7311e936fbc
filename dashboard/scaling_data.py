"""What the Scaling page shows: a store in, DataFrames out.

Only the timed cells of a few variants are read, with their raw readings; the fits and the crossings are
those of ``harness scaling`` and ``harness compare --break-even``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from sqlalchemy import func, select

from harness.cli.output import format_value
from harness.comparing.cells import Cell, cells_in
from harness.comparing.crossings import TIMES, Crossing, crossings, crossings_in_words
from harness.comparing.growth import MIN_SIZES, Axis, Growth, growths, shape_of
from harness.comparing.lengths import GROWING
from harness.comparing.ratios import CONTROL, SPEEDUPS
from harness.records import CellKind, Status
from harness.scaling import Exponent
from harness.store.frames import frame_of, reading, typed
from harness.store.selection import current
from harness.store.store import Store
from harness.store.tables import cells, imports, records, variants

from .queries import marks_text
from .variant_names import marked_names, variant_names

__all__ = [
    "BYTES",
    "FIT_COLUMNS",
    "POINT_COLUMNS",
    "TIMES",
    "Timed",
    "crossing_sentence",
    "crossing_table",
    "crossings_of",
    "first_choice",
    "fits",
    "growth_of",
    "held_sizes",
    "missing_sizes_command",
    "points",
    "read_timed",
    "timed_models",
    "timed_shapes",
    "timed_variants",
]

BYTES = tuple(metric for metric in GROWING if metric not in TIMES)
POINT_COLUMNS = (
    "variant", "name", "marks", "family", "metric", "line", "mode", "size", "value", "lower", "upper", "unit",
)  # fmt: skip
FIT_COLUMNS = (
    "variant", "name", "metric", "line", "mode", "exponent", "lower", "upper", "first", "last", "sizes",
    "basis", "local", "note",
)  # fmt: skip

_IS_TIMED = (cells.c.kind == str(CellKind.SCENARIO)) & (cells.c.status == str(Status.OK))
_DEFAULT_LENGTHS, _DEFAULT_BATCHES = (128, 512, 2048), (1, 8, 64)


# --- what there is ----------------------------------------------------------------------------


def timed_models(store: Store, sweep: int | None) -> list[str]:
    """The models that anything was timed on: those with the most shapes first."""
    shapes = func.count(cells.c.scenario.distinct())
    query = (
        select(variants.c.model)
        .join(cells, cells.c.variant_id == variants.c.id)
        .group_by(variants.c.model)
        .order_by(shapes.desc(), variants.c.model)
    )
    with reading(store) as connection:
        return list(connection.scalars(query.where(_IS_TIMED, current(connection, sweep))))


def timed_shapes(store: Store, model: str, sweep: int | None) -> pd.DataFrame:
    """One row for each variant of a model and shape that it was timed at.

    Columns: variant, batch_size, prompt_len, new_tokens.
    """
    query = (
        select(cells.c.variant_id.label("variant"), cells.c.scenario)
        .join(variants, cells.c.variant_id == variants.c.id)
        .where(variants.c.model == model)
        .distinct()
    )
    with reading(store) as connection:
        found = connection.execute(query.where(_IS_TIMED, current(connection, sweep))).all()
    labels = {label: shape_of(label or "") for label in {row.scenario for row in found}}
    rows = [(row.variant, *shape) for row in found if (shape := labels[row.scenario]) is not None]
    return pd.DataFrame(rows, columns=["variant", "batch_size", "prompt_len", "new_tokens"], dtype="int64")


def timed_variants(store: Store, model: str, shapes: pd.DataFrame) -> pd.DataFrame:
    """The timed variants of a model, one row each.

    Columns: variant, name, marks, method, family, dtype, device_name, seed, origin, and how many prompt_lens
    and batch_sizes it was timed at. Baselines come first, then those with the most sizes.

    Args:
        shapes: `timed_shapes` of the model.
    """
    query = (
        select(
            variants.c.id.label("variant"), variants.c.method, variants.c.family, variants.c.dtype,
            variants.c.device_name, variants.c.seed, variants.c.simulated, variants.c.synthetic,
            imports.c.origin,
        )
        .outerjoin(imports, imports.c.sweep_id == variants.c.sweep_id)
        .where(variants.c.model == model)
        .order_by(variants.c.id)
    )  # fmt: skip
    with reading(store) as connection:
        frame = typed(frame_of(connection, query), integers=("variant", "seed"))
    counts = shapes.groupby("variant").agg(
        prompt_lens=("prompt_len", "nunique"), batch_sizes=("batch_size", "nunique")
    )
    frame = frame.merge(counts, left_on="variant", right_index=True)
    frame.insert(1, "name", frame["variant"].map(variant_names(frame)).astype(object))
    known = zip(frame.pop("simulated"), frame.pop("synthetic"), frame["origin"], strict=True)
    marks = [
        marks_text(simulated=bool(simulated), synthetic=bool(synthetic), imported=origin is not None)
        for simulated, synthetic, origin in known
    ]
    frame.insert(2, "marks", pd.Series(marks, index=frame.index, dtype=object))
    order = frame.assign(
        is_baseline=frame["family"] == "baseline", sizes=frame["prompt_lens"] + frame["batch_sizes"]
    ).sort_values(["is_baseline", "sizes", "variant"], ascending=[False, False, True], kind="stable")
    return frame.loc[order.index].reset_index(drop=True)


def first_choice(about: pd.DataFrame, most: int) -> list[int]:
    """The baseline, then one variant of each method, then whatever else: what to draw at first."""
    bare = about["method"].str.partition(":")[0]
    once = about[~bare.duplicated()]
    rest = about[bare.duplicated()]
    return [int(variant) for variant in pd.concat([once, rest])["variant"][:most]]


def held_sizes(shapes: pd.DataFrame, chosen: Sequence[int], axis: Axis) -> list[tuple[int, int]]:
    """What can be held along an axis (the other size and the new tokens), the most sizes first."""
    mine = shapes[shapes["variant"].isin(chosen)]
    held, size = "batch_size", "prompt_len"
    if axis is Axis.BATCH_SIZE:
        held, size = size, held
    counts = mine.groupby([held, "new_tokens"])[size].nunique()
    ordered = sorted(counts.items(), key=lambda pair: (-int(pair[1]), pair[0]))
    return [(int(fixed), int(new)) for (fixed, new), _ in ordered]


# --- the cells of a few variants --------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """The timed cells of some variants."""

    cells: dict[int, list[Cell]]


def read_timed(store: Store, chosen: Sequence[int], sweep: int | None) -> Timed:
    """The timed cells of the chosen variants, with the metrics that grow and their raw readings."""
    wanted = [*GROWING, CONTROL, *sorted(set(SPEEDUPS.values()))]
    query = (
        select(
            cells.c.sweep_id.label("sweep"), variants.c.model, variants.c.method, variants.c.family,
            variants.c.seed, variants.c.dtype, variants.c.device_name, variants.c.chain.label("options"),
            cells.c.status, cells.c.reason, cells.c.kind, cells.c.task,
            cells.c.scenario, imports.c.origin, records.c.metric, records.c.value, records.c.unit,
            records.c.lower, records.c.upper, records.c.mode, cells.c.id.label("cell"),
            variants.c.id.label("variant"),
        )
        .select_from(
            cells.join(variants, cells.c.variant_id == variants.c.id)
            .join(records, records.c.cell_id == cells.c.id)
            .outerjoin(imports, imports.c.sweep_id == cells.c.sweep_id)
        )
        .where(cells.c.variant_id.in_([int(variant) for variant in chosen]))
        .where(records.c.metric.in_(wanted), _IS_TIMED)
        .order_by(cells.c.id, records.c.id)
    )  # fmt: skip
    with reading(store) as connection:
        frame = frame_of(connection, query.where(current(connection, sweep)))
    frame = typed(frame, floats=("value", "lower", "upper"), integers=("sweep", "seed", "cell", "variant"))
    frame = frame[[shape_of(label) is not None for label in frame["scenario"]]]
    owners = dict(zip(frame["cell"], frame["variant"], strict=True))
    by_variant: dict[int, list[Cell]] = {int(variant): [] for variant in chosen}
    for cell in cells_in(store, frame):
        by_variant[int(owners[cell.id])].append(cell)
    return Timed(by_variant)


# --- growth -----------------------------------------------------------------------------------


def growth_of(
    timed: Timed, axis: Axis, held: tuple[int, int], metrics: Sequence[str]
) -> dict[int, list[Growth]]:
    """The lines of each variant along an axis, with what is held; those of fewer sizes have no exponent."""
    found = {}
    for variant, mine in timed.cells.items():
        here = [cell for cell in mine if axis.fixed(shape_of(cell.label) or (0, 0, 0)) == held]
        found[variant] = list(growths(here, axis, metrics, fewest=1))
    return found


def points(lines: dict[int, list[Growth]], about: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The measured points of a metric: rows of `POINT_COLUMNS`, ordered by variant, line and size.

    `line` numbers the lines of a variant: what was measured under other conditions is not joined.
    """
    by_id = about.set_index("variant")
    rows = [
        (
            variant, *by_id.loc[variant, ["name", "marks", "family"]], metric, number, line.mode, size,
            value, *line.intervals[size], line.unit,
        )
        for variant, growing in lines.items()
        for number, line in _of_metric(growing, metric)
        for size, value in line.values.items()
    ]  # fmt: skip
    return typed(
        pd.DataFrame(rows, columns=list(POINT_COLUMNS), dtype=object),
        floats=("value", "lower", "upper"),
        integers=("variant", "line", "size"),
    )


def fits(lines: dict[int, list[Growth]], about: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The exponent of every line, or why it has none: rows of `FIT_COLUMNS`."""
    names = marked_names(about)
    rows = []
    for metric in metrics:
        for variant, growing in lines.items():
            for number, line in _of_metric(growing, metric):
                rows.append(_fit_row(variant, names[variant], number, line))
    return typed(
        pd.DataFrame(rows, columns=list(FIT_COLUMNS), dtype=object),
        floats=("exponent", "lower", "upper"),
        integers=("variant", "line", "first", "last", "sizes"),
    )


def _of_metric(growing: Sequence[Growth], metric: str) -> Iterator[tuple[int, Growth]]:
    """The lines of a metric, numbered."""
    return enumerate(line for line in growing if line.metric == metric)


def _fit_row(variant: int, name: str, number: int, line: Growth) -> tuple[Any, ...]:
    sizes = list(line.values)
    head = (variant, name, line.metric, number, line.mode)
    if line.exponent is None:
        few = f"an exponent needs {MIN_SIZES} sizes, this has {len(sizes)}"
        note = "; ".join(filter(None, [few, line.note]))
        return (*head, None, None, None, sizes[0], sizes[-1], len(sizes), line.basis, "", note)
    fit = line.exponent
    local = "; ".join(f"{each.first:g} to {each.last:g}: {_exponent_text(each)}" for each in fit.local)
    bounds = (fit.exponent, fit.lower, fit.upper)
    return (*head, *bounds, sizes[0], sizes[-1], len(sizes), line.basis, local, line.note)


def _exponent_text(fit: Exponent) -> str:
    if fit.lower is None or fit.upper is None:
        return format_value(fit.exponent)
    return f"{format_value(fit.exponent)} [{format_value(fit.lower)}, {format_value(fit.upper)}]"


def missing_sizes_command(model: str, methods: Sequence[str], shapes: pd.DataFrame, axis: Axis) -> str:
    """The sweep that would measure enough sizes along an axis, beside those that are there.

    Args:
        shapes: `timed_shapes` of the variants that are meant.
    """
    lengths = sorted({int(each) for each in shapes["prompt_len"]})
    batches = sorted({int(each) for each in shapes["batch_size"]})
    new = sorted({int(each) for each in shapes["new_tokens"]})
    if axis is Axis.PROMPT_LEN:
        lengths, batches = _enough(lengths, _DEFAULT_LENGTHS), batches[:1]
    else:
        lengths, batches = lengths[:1], _enough(batches, _DEFAULT_BATCHES)
    parts = [
        "harness", "sweep", "--models", model, "--methods", ",".join(methods),
        "--prompt-lens", ",".join(map(str, lengths or _DEFAULT_LENGTHS[:1])),
        "--batch-sizes", ",".join(map(str, batches or _DEFAULT_BATCHES[:1])),
    ]  # fmt: skip
    if new:
        parts += ["--new-tokens", str(new[-1])]
    return shlex.join(parts)


def _enough(there: Sequence[int], usual: Sequence[int]) -> list[int]:
    """At least `MIN_SIZES`: what is there, and of the usual ones those that are missing."""
    sizes = list(there)
    for each in usual:
        if len(sizes) < MIN_SIZES and each not in sizes:
            sizes.append(each)
    return sorted(sizes)


# --- crossings --------------------------------------------------------------------------------


def crossings_of(timed: Timed, a: int, b: int, axis: Axis, metric: str) -> list[Crossing]:
    """Where two variants cost the same time along an axis; empty where too little was timed of both."""
    found = crossings(timed.cells.get(a, []), timed.cells.get(b, []), axis)
    return [each for each in found if each.metric == metric]


def crossing_table(found: Sequence[Crossing], name_b: str) -> pd.DataFrame:
    """Crossings as text: what was held, where they cross with its interval, what that means, and cautions."""
    rows = []
    for each in found:
        held = "batch size" if each.axis is Axis.PROMPT_LEN else "prompt length"
        mark = "p" if each.axis is Axis.PROMPT_LEN else "b"
        cautions = [f"differ in {difference}" for difference in each.differences]
        rows.append(
            {
                held: each.fixed,
                "new tokens": each.new_tokens,
                "crossing": "none" if each.found.outcome in ("below", "above") else str(each.found),
                "in words": crossings_in_words(each.found, each.ratios, name_b, each.axis, each.intervals),
                "ratios": ", ".join(f"{mark}{size}: {ratio:.3g}" for size, ratio in each.ratios.items()),
                "basis": ", ".join(dict.fromkeys(each.bases.values())),
                "caution": "; ".join([*cautions, *each.flags]),
            }
        )
    return pd.DataFrame(rows)


def crossing_sentence(each: Crossing, name_b: str) -> str:
    """One crossing said in words, with its place and its interval."""
    words = crossings_in_words(each.found, each.ratios, name_b, each.axis, each.intervals)
    if each.found.batch is None:
        return f"No crossing: {words}."
    what = "tokens of prompt" if each.axis is Axis.PROMPT_LEN else "sequences in a batch"
    return f"Both take the same time at {each.found} {what}; {words}."
