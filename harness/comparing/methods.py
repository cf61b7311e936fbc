"""Comparing two sides by what is stored: rows of ratios for times and sizes, paired tests for quality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from harness.comparability import Difference, scope_of
from harness.comparing.cells import Cell, all_cells
from harness.comparing.comparison import Comparison
from harness.comparing.matching import Absent, Group, groups_of, is_compared, missing, pairs_of
from harness.comparing.quality import outcome_of
from harness.comparing.ratios import across, timing_ratio
from harness.comparing.sides import Side, SideName
from harness.display import in_times
from harness.errors import ConfigError, UnknownName
from harness.evaluate.metrics import metric_of
from harness.evaluate.paired import benjamini_hochberg
from harness.store.store import Store

__all__ = [
    "LEVEL",
    "Compared",
    "adjusted",
    "compare_cells",
    "compare_methods",
    "compare_sides",
    "incomparable",
    "ratio_verdict",
]

LEVEL = 0.05
SAME = "same measurement"
_AGAINST_BASELINE = frozenset({"mean_kl", "top1_agreement", "embedding_distance"})
_SIZE_WORDS = ("smaller", "larger")
_RATIO_WORDS = {
    "s": ("faster", "slower"),
    "tokens/s": ("faster", "slower"),
    "x": ("faster", "slower"),
    "B": _SIZE_WORDS,
    "B/token": _SIZE_WORDS,
    "J": ("less", "more"),
    "J/token": ("less", "more"),
    "W": ("less", "more"),
}


@dataclass(frozen=True)
class Compared:
    """What two or more sides say: `rows`, comparable or not, and what is `absent` on one of them.

    `metrics` are all that any cell of theirs recorded, compared or not.
    """

    rows: tuple[Comparison, ...]
    absent: tuple[Absent, ...]
    metrics: frozenset[str]


def compare_sides(a: Side, others: Sequence[Side], *, metrics: Sequence[str] | None = None) -> Compared:
    """Compare each of the others with `a`, methods with methods or sweeps and stores with their like.

    P-values are adjusted over all tests of the call. Rows that should not be compared are among them, with
    their `differences`.

    Raises:
        ConfigError: a side is compared with itself, or two share nothing; a method with a whole sweep;
            nothing of the method `a` was measured.
        UnknownName: a metric that no side has.
    """
    if not a.name.is_matrix and not a.ok:
        raise ConfigError(f"nothing of {a.text} was measured: {a.cells[-1].told}")
    rows: list[Comparison] = []
    absent: list[Absent] = []
    for b in others:
        if b.scope == a.scope and b.name.method == a.name.method and b.name.variant == a.name.variant:
            raise ConfigError(f"{a.text} is compared with itself")
        groups = groups_of(a, b)
        found = [
            row for group in groups for row in _compared(group, a.scope == b.scope, a.name.is_matrix, metrics)
        ]
        lacking = missing(groups, a.name.is_matrix, metrics)
        if not found and not lacking and metrics is None:
            if a.name.is_matrix:
                raise ConfigError(f"{a.text} and {b.text} share no variant: nothing to compare")
            raise ConfigError(
                f"{a.text} and {b.text} share no model, seed and cell: sweep both with the same command"
            )
        rows += [replace(row, side_a=a.text, side_b=b.text) for row in _weighed_once(found)]
        absent += lacking
    known = frozenset(
        m for side in (a, *others) for cell in side.cells for m in (*cell.records, *cell.broken)
    )
    if metrics is not None and (unknown := sorted(set(metrics) - {row.metric for row in rows} - _of(absent))):
        raise UnknownName("compared metric", unknown[0], known)
    return Compared(tuple(adjusted(rows)), tuple(absent), known)


def compare_cells(a: Cell, b: Cell, metrics: Sequence[str] | None = None) -> list[Comparison]:
    """Compare two cells of one store that ask the same; p-values are not adjusted yet (`adjusted`)."""
    return list(_compared(Group((a,), (b,)), True, False, metrics))


def _weighed_once(rows: Sequence[Comparison]) -> list[Comparison]:
    """The same object is weighed in each of its cells: one row says it."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for row in rows:
        what = (row.model, row.method_a, row.method_b, row.seed, row.dtype, row.device, row.a, row.b)
        if row.metric != "weight_bytes" or what not in seen:
            kept.append(row)
        if row.metric == "weight_bytes":
            seen.add(what)
    return kept


def _of(absent: Sequence[Absent]) -> set[str]:
    return {metric for each in absent for metric in each.metrics}


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
    cells = all_cells(store, models)
    known = sorted({cell.method for cell in cells if cell.is_ok})
    sides = []
    for name in (a, *names):
        if name not in known:
            raise UnknownName("method in this store:", name, known)
        kept = tuple(cell for cell in cells if cell.method == name)
        sides.append(Side(SideName(name, method=name), kept, (store.label, None)))
    found = compare_sides(sides[0], sides[1:], metrics=metrics).rows
    if not allow_different and (refused := incomparable(found)):
        raise ConfigError("; ".join(refused))
    return list(found)


def incomparable(found: Sequence[Comparison]) -> list[str]:
    """One line for each difference that keeps rows from being compared, with how many rows it concerns."""
    seen: dict[tuple[str, str, Difference], list[str]] = {}
    for row in found:
        for each in row.differences:
            seen.setdefault((*_names(row), each), []).append(row.cell)
    return [
        f"{a} and {b} differ in {each} ({', '.join(dict.fromkeys(places))})"
        for (a, b, each), places in seen.items()
    ]


def _names(row: Comparison) -> tuple[str, str]:
    """What two sides are called: the methods, or where the one method's rows are."""
    if row.method_a != row.method_b:
        return row.method_a, row.method_b
    return f"{row.method_a} of {row.side_a}", f"{row.method_b} of {row.side_b}"


# --- rows ---------------------------------------------------------------------------------------------


def _compared(
    group: Group, is_one_scope: bool, is_matrix: bool, metrics: Sequence[str] | None
) -> Iterator[Comparison]:
    of_a, of_b = group.ok
    items = cache(Cell.items)
    for metric in dict.fromkeys(name for cell in of_a for name in cell.records):
        if metrics is not None and metric not in metrics:
            continue
        with_a, with_b = ([cell for cell in side if metric in cell.records] for side in (of_a, of_b))
        if not with_b or not is_compared(metric, with_a[0].units[metric], is_matrix):
            continue
        scope = scope_of(with_a[0].kind, with_a[0].units[metric], metric)
        for a, b, found, passed in pairs_of(with_a, with_b, scope, metric):
            base = _base(a, b, metric, group.options, found, passed)
            if a.measurement == b.measurement:
                yield replace(
                    base, ratio=1.0 if base.a else None, difference=0.0, basis=SAME, verdict="equal"
                )
            elif a.kind == "task":
                same_data = a.conditions.facts.get("task") == b.conditions.facts.get("task") is not None
                by_baseline = a.is_baseline or b.is_baseline
                yield _quality(base, items(a), items(b), by_baseline, bool(same_data))
            elif base.a > 0:
                yield _ratio(base, a, b, is_one_scope and a.setting == b.setting)
            else:
                yield replace(base, difference=base.b - base.a)


def _base(
    a: Cell,
    b: Cell,
    metric: str,
    options: str,
    found: tuple[Difference, ...],
    passed: str | None,
) -> Comparison:
    flags = [text for text in (passed, options) if text]
    for name, cell in (("a", a), ("b", b)):
        about = cell.conditions
        if about.simulated and cell.kind != "task":
            flags.append(f"{name} is simulated")
        if str(about.facts.get("throttled") or "none") != "none" and cell.kind == "scenario":
            flags.append(f"{name} was throttled")
    if b.conditions.synthetic:
        flags.append("synthetic weights")
    for origin in dict.fromkeys(cell.origin for cell in (a, b) if cell.origin is not None):
        flags.append(f"imported from {origin}")
    limits = [cell.conditions.limit for cell in (a, b)]
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


def _ratio(base: Comparison, a: Cell, b: Cell, has_one_baseline: bool) -> Comparison:
    if has_one_baseline:
        found = timing_ratio(
            base.metric, a.records, b.records, a_is_baseline=a.is_baseline, b_is_baseline=b.is_baseline
        )
    else:
        found = across(base.metric, a.records, b.records)
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
    words = _SIZE_WORDS if row.metric.endswith("compression_ratio") else _RATIO_WORDS.get(row.unit)
    if words is None or row.ratio is None or row.ratio <= 0:
        return ""
    if row.ratio == 1:
        return "equal"
    if row.lower is not None and row.upper is not None and row.lower <= 1 <= row.upper:
        return "no clear difference"
    good, bad = words
    is_gain = (row.ratio > 1) == (row.unit in ("tokens/s", "x"))
    factor = max(row.ratio, 1 / row.ratio)
    return f"{in_times(factor)}x {good if is_gain else bad}"


def _quality(
    base: Comparison, items_a: Sequence[Any], items_b: Sequence[Any], by_baseline: bool, same_data: bool
) -> Comparison:
    base = replace(base, difference=base.b - base.a)
    found = outcome_of(items_a, items_b, base.metric, base.a, base.b, same_data=same_data)
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
        rows.append(
            row if row.kind != "task" or row.basis == SAME else replace(row, verdict=_quality_verdict(row))
        )
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
