"""Two variants side by side: ratios for times and sizes, paired tests for quality.

`a` is what one has, `b` what one might take; a difference is b minus a, a ratio b over a. Only variants of
the same model, seed, type and device are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from harness.errors import ConfigError, UnknownName
from harness.evaluate.intervals import percentile_interval
from harness.evaluate.paired import (
    benjamini_hochberg,
    mcnemar,
    minimum_detectable_effect,
    paired_bootstrap_difference,
)
from harness.store import queries
from harness.store.readings import readings
from harness.store.store import Store

__all__ = ["Comparison", "Gate", "compare_methods", "parse_gate", "tripped"]

PAIRED = ("acc", "acc_norm", "nll")
_SKIPPED_UNITS = ("steps",)
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of two variants.

    `ratio` is b/a with its interval for times and sizes; `difference` is b - a with its interval for
    quality; `p` is the two-sided p-value of the paired test, adjusted for the number of tests
    (Benjamini-Hochberg); `detectable` the smallest difference that this many items would show.
    """

    model: str
    cell: str
    metric: str
    unit: str
    a: float
    b: float
    ratio: float | None = None
    difference: float | None = None
    lower: float | None = None
    upper: float | None = None
    p: float | None = None
    test: str | None = None
    detectable: float | None = None


def compare_methods(store: Store, a: str, b: str, models: Sequence[str] | None = None) -> list[Comparison]:
    """Compare two methods, named as in the results, on every model that both were measured on.

    Raises:
        UnknownName: a method that the store has no rows of.
        ConfigError: no model, seed, type and device on which both have ok rows.
    """
    frame = queries.results(store, models=models, statuses=["ok"])
    frame = frame[frame["metric"].notna()]
    known = sorted(set(frame["method"]))
    for name in (a, b):
        if name not in known:
            raise UnknownName("method in this store:", name, known)
    place = ["model", "seed", "dtype", "device_name", "kind", "task", "scenario", "metric"]
    sides = [frame[frame["method"] == name] for name in (a, b)]
    pairs = sides[0].merge(sides[1], on=place, suffixes=("_a", "_b"))
    if pairs.empty:
        raise ConfigError(
            f"{a} and {b} share no model, seed, type and device in this store: "
            "sweep both with the same command"
        )
    rows: list[dict[str, Any]] = [dict(row) for row in pairs.to_dict("records")]  # type: ignore[arg-type]
    return _adjusted([_compare(store, row) for row in rows if _is_compared(row)])


def _is_compared(row: dict[str, Any]) -> bool:
    return (
        row["unit_a"] not in _SKIPPED_UNITS
        and row["metric"] not in ("flips", "mean_kl", "top1_agreement", "choice_kl")
        and not row["metric"].endswith(("_difference", "_rise"))
        and all(isinstance(row[s], float) and math.isfinite(row[s]) for s in ("value_a", "value_b"))
    )


def _compare(store: Store, row: dict[str, Any]) -> Comparison:
    base = Comparison(
        model=row["model"],
        cell=row["task"] or row["scenario"],
        metric=row["metric"],
        unit=row["unit_a"] or "",
        a=row["value_a"],
        b=row["value_b"],
    )
    if row["kind"] == "task":
        return _quality(store, row, replace(base, difference=base.b - base.a))
    if base.a <= 0:
        return replace(base, difference=base.b - base.a)
    return _timing(store, row, replace(base, ratio=base.b / base.a))


def _timing(store: Store, row: dict[str, Any], base: Comparison) -> Comparison:
    """The ratio of medians with a bootstrap interval, from the raw readings where there are any."""
    raw = []
    for side in ("_a", "_b"):
        samples = readings(store, int(row["cell" + side]), row["metric"])
        raw.append(np.asarray(samples, dtype=np.float64))
    if min(len(each) for each in raw) < 3:
        return base
    random = np.random.default_rng(0)
    medians = [np.median(each[random.integers(len(each), size=(_DRAWS, len(each)))], axis=1) for each in raw]
    lower, upper = percentile_interval(medians[1] / medians[0])
    return replace(base, lower=lower, upper=upper)


def _quality(store: Store, row: dict[str, Any], base: Comparison) -> Comparison:
    if row["metric"] not in PAIRED:
        return base
    items = queries.paired_items(store, int(row["cell_a"]), int(row["cell_b"]), row["metric"])
    if items.empty:
        return base
    a, b = items["a"].to_numpy(float), items["b"].to_numpy(float)
    difference = paired_bootstrap_difference(list(a), list(b), 0)
    base = replace(base, lower=difference.lower, upper=difference.upper)
    if row["metric"].startswith("acc"):
        lost, won = int(((a >= 0.5) & (b < 0.5)).sum()), int(((a < 0.5) & (b >= 0.5)).sum())
        detectable = minimum_detectable_effect(len(a), (lost + won) / len(a))
        return replace(base, p=mcnemar(lost, won), test="McNemar", detectable=detectable)
    if len(a) < 2 or not np.any(a != b):
        return base
    return replace(base, p=float(stats.wilcoxon(b - a).pvalue), test="Wilcoxon")


def _adjusted(found: list[Comparison]) -> list[Comparison]:
    tested = [index for index, each in enumerate(found) if each.p is not None]
    adjusted = benjamini_hochberg([float(found[index].p or 0.0) for index in tested])
    for index, p in zip(tested, adjusted, strict=True):
        found[index] = replace(found[index], p=p)
    return found


# --- gates --------------------------------------------------------------------------------------------

_GATE = re.compile(r"^\s*([a-z][\w,/-]*)\s*([<>])\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(x?)\s*$", re.I)


@dataclass(frozen=True, slots=True)
class Gate:
    """``decode_latency>1.05x`` (a ratio) or ``acc<-0.01`` (a difference)."""

    text: str
    metric: str
    above: bool
    bound: float
    is_ratio: bool

    def trips(self, comparison: Comparison) -> bool:
        value = comparison.b / comparison.a if self.is_ratio else comparison.b - comparison.a
        return value > self.bound if self.above else value < self.bound


def parse_gate(text: str) -> Gate:
    """Parse a gate.

    Raises:
        ConfigError: it is not written as metric, < or >, number, and x for a ratio.
    """
    match = _GATE.match(text)
    if match is None:
        raise ConfigError(
            f"--fail-on {text!r}: write a ratio as decode_latency>1.05x, a difference as acc<-0.01"
        )
    metric, sign, bound, ratio = match.groups()
    return Gate(text.strip(), metric, sign == ">", float(bound), bool(ratio))


def tripped(gates: Iterable[Gate], found: Sequence[Comparison]) -> list[tuple[Gate, Comparison]]:
    """The gates that trip, each with the comparison that trips it.

    Raises:
        UnknownName: a gate on a metric that was not compared; a gate that cannot trip is no gate.
        ConfigError: a ratio to a value of zero.
    """
    trips = []
    for gate in gates:
        concerned = [each for each in found if each.metric == gate.metric]
        if not concerned:
            raise UnknownName("compared metric", gate.metric, {each.metric for each in found})
        if gate.is_ratio and any(each.a == 0 for each in concerned):
            raise ConfigError(f"--fail-on {gate.text}: {gate.metric} is 0 in a, a ratio means nothing")
        trips += [(gate, each) for each in concerned if gate.trips(each)]
    return trips
