"""Comparing methods by what is stored: which cells belong together, and what their records say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from harness.comparability import Conditions, Difference, Scope, differences, read_conditions, scope_of
from harness.comparing.comparison import Comparison
from harness.comparing.quality import outcome_of
from harness.comparing.ratios import CONTROL, Reading, timing_ratio
from harness.errors import ConfigError, UnknownName
from harness.evaluate.metrics import metric_of
from harness.evaluate.paired import benjamini_hochberg
from harness.records import Item
from harness.store import queries
from harness.store.readings import all_readings
from harness.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Cell",
    "adjusted",
    "cells_in",
    "cells_of",
    "compare_cells",
    "compare_methods",
    "incomparable",
    "pairs_of",
    "ratio_verdict",
]

LEVEL = 0.05
_PLACE = ["model", "seed", "kind", "task", "scenario", "origin"]  # what was imported stands apart
_COUNTS = frozenset({"outlier_column_share", "outlier_columns_beyond_capacity"})  # neither good nor bad
_NOT_COMPARED = frozenset({CONTROL, "flips", "choice_kl", "verdict"}) | _COUNTS
_DERIVED = ("_difference", "_rise", "_p", "_detectable", "_speedup")
_AGAINST_BASELINE = frozenset({"mean_kl", "top1_agreement", "embedding_distance"})
_RATIO_WORDS = {
    "s": ("faster", "slower"),
    "tokens/s": ("faster", "slower"),
    "B": ("smaller", "larger"),
    "B/token": ("smaller", "larger"),
    "J": ("less", "more"),
    "J/token": ("less", "more"),
    "W": ("less", "more"),
}


class Cell:
    """A stored cell with its records and readings by metric."""

    def __init__(self, row: Mapping[str, Any], records: dict[str, Reading], units: dict[str, str]) -> None:
        self.id, self.method = int(row["cell"]), str(row["method"])
        self.sweep, self.dtype, self.device = int(row["sweep"]), row["dtype"], row["device_name"]
        self.is_baseline, self.origin = row["family"] == "baseline", row["origin"]
        self.place: tuple[Any, ...] = tuple(row[name] for name in _PLACE)
        self.records, self.units = records, units

    @property
    def kind(self) -> str:
        return str(self.place[2])

    @property
    def label(self) -> str:
        return str(self.place[3] or self.place[4])


def compare_methods(
    store: Store,
    a: str,
    others: str | Sequence[str],
    models: Sequence[str] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    allow_different: bool = False,
) -> list[Comparison]:
    """Compare methods with `a`, named as in the results, on every model that both were measured on.

    P-values are adjusted over all tests of the whole comparison, so several `others` belong into one
    call. Where a place was measured several times (other versions, another limit), the newest cells that
    may be compared are.

    Args:
        others: one method or several.
        allow_different: return rows that should not be compared too, with their `differences`.

    Raises:
        UnknownName: a method that the store has no rows of, a metric that was not compared.
        ConfigError: nothing that both were measured in, or rows that were measured under different
            conditions and `allow_different` is not set.
    """
    names = [others] if isinstance(others, str) else list(dict.fromkeys(others))
    found: list[Comparison] = []
    cells = cells_of(store, models)
    known = sorted({cell.method for cell in cells})
    for name in (a, *names):
        if name not in known:
            raise UnknownName("method in this store:", name, known)
    mine = [cell for cell in cells if cell.method == a]
    for name in names:
        if name == a:
            raise ConfigError(f"{a} is compared with itself")
        theirs = [cell for cell in cells if cell.method == name]
        rows = compare_cells(store, mine, theirs, metrics)
        if not rows and metrics is None:
            raise ConfigError(
                f"{a} and {name} share no model, seed and cell in this store: "
                "sweep both with the same command"
            )
        found += rows
    if metrics is not None and (absent := sorted(set(metrics) - {row.metric for row in found})):
        raise UnknownName("compared metric", absent[0], {m for cell in mine for m in cell.records})
    if not allow_different and (refused := incomparable(found)):
        raise ConfigError("; ".join(refused))
    return adjusted(found)


def compare_cells(
    store: Store,
    mine: Sequence[Cell],
    theirs: Sequence[Cell],
    metrics: Sequence[str] | None = None,
    *,
    conditions: Mapping[int, Conditions] | None = None,
    items: Callable[[int], Sequence[Item]] | None = None,
) -> list[Comparison]:
    """Compare the cells of two variants at every place that both have; p-values are not adjusted yet.

    Args:
        conditions, items: what many comparisons share; they are read from the store where they are not given.
    """
    known = (
        read_conditions(store, {cell.id for cell in (*mine, *theirs)}) if conditions is None else conditions
    )
    return list(_compared(mine, theirs, metrics, known, items or cache(store.items)))


def incomparable(found: Sequence[Comparison]) -> list[str]:
    """One line for each difference that keeps rows from being compared, with how many rows it concerns."""
    seen: dict[tuple[str, str, Difference], list[str]] = {}
    for row in found:
        for each in row.differences:
            seen.setdefault((row.method_a, row.method_b, each), []).append(row.cell)
    return [
        f"{a} and {b} differ in {each} ({', '.join(dict.fromkeys(places))})"
        for (a, b, each), places in seen.items()
    ]


def cells_of(store: Store, models: Sequence[str] | None = None) -> list[Cell]:
    """The current ok cells with their finite records and raw readings."""
    return cells_in(store, queries.results(store, models=models, statuses=["ok"]))


def cells_in(store: Store, frame: pd.DataFrame) -> list[Cell]:
    """The cells of rows of `harness.store.queries.results`, with their finite records and raw readings."""
    frame = frame[frame["metric"].notna() & frame["value"].notna()]
    frame = frame.astype(object).where(frame.notna(), None)
    readings = all_readings(store, {int(cell) for cell in frame["cell"]})
    cells = []
    for _, group in frame.groupby("cell", sort=True):
        rows = group.to_dict("records")
        records = {
            row["metric"]: Reading(
                row["value"],
                readings.get((int(row["cell"]), row["metric"]), ()),
                row["lower"],
                row["upper"],
                row["mode"],
            )
            for row in rows
            if math.isfinite(row["value"])
        }
        units = {row["metric"]: row["unit"] or "" for row in rows}
        cells.append(Cell({str(key): value for key, value in rows[0].items()}, records, units))
    return cells


# --- which cells belong together ----------------------------------------------------------------------


def pairs_of(
    mine: Sequence[Cell],
    theirs: Sequence[Cell],
    scope: Scope,
    conditions: Mapping[int, Conditions],
    metric: str,
) -> Iterator[tuple[Cell, Cell, tuple[Difference, ...], str | None]]:
    """For one place the pairs to compare: the newest comparable one of each device and type.

    Where no pair is comparable, the newest with what keeps it from being compared. The text says where a
    newer measurement of b was passed over.
    """
    judged = []
    for b in sorted(theirs, key=lambda cell: -cell.id):
        for a in sorted(mine, key=lambda cell: -cell.id):
            modes = a.records[metric].mode, b.records[metric].mode
            judged.append((a, b, differences(conditions[a.id], conditions[b.id], scope, modes)))
    comparable = [each for each in judged if not each[2]]
    if not comparable:
        yield (*judged[0], None)
        return
    # All items of a task are better evidence than the first few, whichever is newer.
    comparable.sort(key=lambda each: conditions[each[1].id].limit or math.inf, reverse=True)
    has_partner = {b.id for _, b, _ in comparable}
    done = set()
    for a, b, none in comparable:
        setting = b.dtype, b.device
        if setting in done:
            continue
        done.add(setting)
        newer = [
            x.sweep for x in theirs
            if x.id > b.id and (x.dtype, x.device) == setting and x.id not in has_partner
        ]  # fmt: skip
        passed = f"sweep {max(newer)} measured b under other conditions" if newer else None
        yield a, b, none, passed


def _compared(
    mine: Sequence[Cell],
    theirs: Sequence[Cell],
    metrics: Sequence[str] | None,
    conditions: Mapping[int, Conditions],
    items: Callable[[int], Sequence[Item]],
) -> Iterator[Comparison]:
    weighed: set[tuple[Any, ...]] = set()
    for place in dict.fromkeys(cell.place for cell in mine):
        of_a = [cell for cell in mine if cell.place == place]
        of_b = [cell for cell in theirs if cell.place == place]
        for metric in dict.fromkeys(name for cell in of_a for name in cell.records):
            if metrics is not None and metric not in metrics:
                continue
            with_a, with_b = ([cell for cell in side if metric in cell.records] for side in (of_a, of_b))
            if not with_b or not _is_compared(metric, with_a[0].units[metric]):
                continue
            scope = scope_of(with_a[0].kind, with_a[0].units[metric], metric)
            for a, b, found, passed in pairs_of(with_a, with_b, scope, conditions, metric):
                base = _base(a, b, metric, conditions, found, passed)
                if metric == "weight_bytes":
                    # The same object is weighed in each of its cells: one row says it.
                    if (what := (base.model, base.seed, base.dtype, base.device, base.a, base.b)) in weighed:
                        continue
                    weighed.add(what)
                if a.kind == "task":
                    yield _quality(base, items(a.id), items(b.id), a.is_baseline or b.is_baseline)
                elif base.a > 0:
                    yield _ratio(base, a, b)
                else:
                    yield replace(base, difference=base.b - base.a)


def _is_compared(metric: str, unit: str) -> bool:
    name = metric.partition("/")[0].partition(",")[0]
    return unit not in ("steps", "p") and name not in _NOT_COMPARED and not name.endswith(_DERIVED)


def _base(
    a: Cell,
    b: Cell,
    metric: str,
    conditions: Mapping[int, Conditions],
    found: tuple[Difference, ...],
    passed: str | None,
) -> Comparison:
    flags = [] if passed is None else [passed]
    for name, cell in (("a", a), ("b", b)):
        about = conditions[cell.id]
        if about.simulated and cell.kind != "task":
            flags.append(f"{name} is simulated")
        if str(about.facts.get("throttled") or "none") != "none" and cell.kind == "scenario":
            flags.append(f"{name} was throttled")
    if conditions[b.id].synthetic:
        flags.append("synthetic weights")
    if b.origin is not None:
        flags.append(f"imported from {b.origin}")
    limits = [conditions[cell.id].limit for cell in (a, b)]
    for limit in dict.fromkeys(limit for limit in limits if limit is not None):
        flags.append(f"limit {limit}")
    return Comparison(
        model=str(a.place[0]),
        cell=a.label,
        metric=metric,
        unit=a.units[metric],
        a=a.records[metric].value,
        b=b.records[metric].value,
        method_a=a.method,
        method_b=b.method,
        kind=a.kind,
        seed=int(a.place[1]),
        dtype=str(b.dtype),
        device=str(b.device),
        mode=b.records[metric].mode,
        flags=tuple(flags),
        differences=found,
        sweep_a=a.sweep,
        sweep_b=b.sweep,
    )


# --- what their records say ---------------------------------------------------------------------------


def _ratio(base: Comparison, a: Cell, b: Cell) -> Comparison:
    found = timing_ratio(
        base.metric, a.records, b.records, a_is_baseline=a.is_baseline, b_is_baseline=b.is_baseline
    )
    lower, upper = found.interval()
    is_paired = found.basis.startswith("paired")
    passing = [each for each in base.differences if is_paired and each.is_passing]
    flags = (*base.flags, *found.flags, *(f"{each}, in the rounds alike" for each in passing))
    row = replace(
        base,
        ratio=found.value,
        lower=lower,
        upper=upper,
        basis=found.basis,
        flags=flags,
        differences=tuple(each for each in base.differences if each not in passing),
    )
    return replace(row, verdict=ratio_verdict(row))


def ratio_verdict(row: Comparison) -> str:
    """In words: ``2.95x faster``, never a percentage of an inverse."""
    if row.unit not in _RATIO_WORDS or row.ratio is None or row.ratio <= 0:
        return ""
    if row.ratio == 1:
        return "equal"
    if row.lower is not None and row.upper is not None and row.lower <= 1 <= row.upper:
        return "no clear difference"
    good, bad = _RATIO_WORDS[row.unit]
    is_gain = (row.ratio > 1) == (row.unit == "tokens/s")
    factor = max(row.ratio, 1 / row.ratio)
    return f"{factor:.3g}x {good if is_gain else bad}"


def _quality(
    base: Comparison, items_a: Sequence[Any], items_b: Sequence[Any], by_baseline: bool
) -> Comparison:
    base = replace(base, difference=base.b - base.a)
    found = outcome_of(items_a, items_b, base.metric, base.a, base.b)
    if found is None:
        return base
    if isinstance(found, Difference):
        return replace(base, differences=(*base.differences, found))
    value, lower, upper = found.difference
    row = replace(base, lower=lower, upper=upper, n=found.n, basis="items", flips=found.flips)
    if by_baseline and base.metric in _AGAINST_BASELINE:
        # The baseline's divergence from itself is no measurement: there is nothing to test.
        return row
    return replace(row, p_raw=found.p, test=found.test, detectable=found.detectable, difference=value)


def adjusted(found: Sequence[Comparison]) -> list[Comparison]:
    """The rows with p-values adjusted over all of them (Benjamini-Hochberg) and verdicts on quality."""
    tested = [row.p_raw for row in found if row.p_raw is not None]
    values = iter(benjamini_hochberg(tested))
    rows = []
    for row in found:
        if row.p_raw is not None:
            row = replace(row, p=next(values), tests=len(tested))
        rows.append(row if row.kind != "task" else replace(row, verdict=_quality_verdict(row)))
    return rows


def _quality_verdict(row: Comparison) -> str:
    if row.difference is None or row.lower is None or row.upper is None:
        return ""
    if row.difference == 0:
        return "equal" if row.lower == row.upper == 0 else "no clear difference"
    unclear = row.lower <= 0 <= row.upper if row.p is None else row.p >= LEVEL
    if unclear:
        return "no clear difference"
    is_better = (row.difference > 0) == (metric_of(row.metric).better == "higher")
    return "better" if is_better else "worse"
