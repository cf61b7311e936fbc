"""From stored rows to one finding: contrasts of losses over items, ratios of times, exponents, exact figures.

Pure over the evidence. Whatever has a spread comes with an interval and a p-value against its bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev

import numpy as np

from harness.claims.decision import Finding, Side
from harness.claims.evidence import Evidence, Incomparable, NotMeasured, StoredCell
from harness.comparability import Scope
from harness.comparing.quality import weights_that_explain
from harness.derive import difference_name
from harness.evaluate.intervals import Floats, sum_of_independent
from harness.evaluate.metrics import metric_of
from harness.evaluate.paired import compare_paired
from harness.records import Item, Record

__all__ = ["exact", "loss_contrast", "prefill_exponent", "speedup"]

Term = tuple[str, str]  # model, method
BASELINE = "baseline"
_Z = NormalDist().inv_cdf(0.975)
_POWER = NormalDist().inv_cdf(0.8)


# --- losses, item by item -----------------------------------------------------------------------------


def loss_contrast(
    evidence: Evidence,
    terms: Mapping[Term, float],
    *,
    task: str,
    what: str,
    expected: Side,
    bound: float = 0.0,
    metric: str = "nll",
    seeds: Sequence[int] = (0,),
) -> Finding:
    """A weighted sum of the losses of several variants, paired over the items that all of them met.

    ``{a: 1, b: -1}`` is by how much a loses more than b; ``{broken: 0.1, clean: 0.9, repaired: -1}`` is above
    zero where nine tenths of the damage are repaired. A share of right answers counts as one minus itself,
    so more is always worse.

    With several seeds the items' sums are averaged over them. The p-value is the larger one of the items'
    test and of a t-test over the seeds, and the interval covers both: neither few items nor few seeds make
    a claim hold. Where a store kept no items, the stored differences to the baseline are combined as if they
    were independent; they share the baseline's noise, so intervals are too wide rather than too narrow.

    Raises:
        NotMeasured: a row is missing. Incomparable: two rows must not be compared.
    """
    by_seed = [
        [(evidence.cell(model, method, task, seed), share) for (model, method), share in terms.items()]
        for seed in seeds
    ]
    cells = [cell for of_seed in by_seed for cell, _ in of_seed]
    evidence.require_comparable(cells, Scope.QUALITY)
    sign = 1.0 if metric_of(metric).better == "lower" else -1.0
    unit = metric_of(metric).unit
    counted = "windows" if metric == "nll" else "items"
    about = _About(what, unit, expected, bound, counted, tuple(sorted({cell.id for cell in cells})))
    sums: list[Floats] = []
    weights: list[float] | None = None
    for of_seed in by_seed:
        found = _item_sums(evidence, of_seed, metric, sign)
        if found is None:
            if len(seeds) > 1:
                raise NotMeasured(what, "the outcomes of single items were not kept", is_missing=False)
            return _from_differences(evidence, of_seed, metric, sign, about)
        if sums and len(found[0]) != len(sums[0]):
            raise Incomparable(f"{what}: the seeds were not scored on the same items")
        sums.append(found[0])
        weights = found[1]
    assert weights is not None
    return _over_items(np.stack(sums), weights, about)


@dataclass(frozen=True)
class _About:
    """What a finding is about, whatever it is computed from."""

    what: str
    unit: str
    expected: Side
    bound: float
    unit_of_n: str
    cells: tuple[int, ...]


def _item_sums(
    evidence: Evidence, terms: Sequence[tuple[StoredCell, float]], metric: str, sign: float
) -> tuple[Floats, list[float]] | None:
    """The weighted sum of every item's losses [items], and what each item counts; None without items."""
    columns: list[list[Item]] = []
    for cell, _ in terms:
        of_cell = {item.index: item for item in evidence.items(cell.id) if item.metric == metric}
        columns.append([of_cell[index] for index in sorted(of_cell)])
    if any(len(column) < 2 for column in columns):
        return None
    order = [item.index for item in columns[0]]
    if any([item.index for item in column] != order for column in columns):
        raise Incomparable(f"{terms[0][0].place}: the variants were not scored on the same items")
    values = [evidence.record(cell, metric).value for cell, _ in terms]
    weights = weights_that_explain(columns[0], columns[-1], values[0], values[-1])
    if weights is None:
        return None
    outcomes = np.array([[item.outcome for item in column] for column in columns])  # [terms, items]
    shares = np.array([share for _, share in terms])
    constant = 0.0 if sign > 0 else float(shares.sum())  # of 1 - outcome
    return constant + sign * shares @ outcomes, weights


def _over_items(sums: Floats, weights: list[float], about: _About) -> Finding:
    """`sums`: [seeds, items]."""
    even = len(set(weights)) == 1
    means = sums.mean(axis=0)
    outcome = compare_paired(
        [about.bound] * len(means), list(means), None if even else weights, answers=False
    )
    value, lower, upper = (each + about.bound for each in outcome.difference)
    p, detectable, test = outcome.p, outcome.detectable, outcome.test
    if len(sums) > 1 and float(np.ptp(sums)) > 0:
        from scipy import stats  # a second that other commands need not wait

        of_seeds = [float(np.average(row, weights=weights)) for row in sums]
        error = stdev(of_seeds) / math.sqrt(len(of_seeds))
        t = stats.t(len(of_seeds) - 1)
        half = float(t.ppf(0.975)) * error
        lower, upper = min(lower, value - half), max(upper, value + half)
        p = max(p, float(2 * t.sf(abs(value - about.bound) / error)) if error else 0.0)
        detectable = max(detectable, float(t.ppf(0.975) + t.ppf(0.8)) * error)
        test += f" over items, t over {len(of_seeds)} seeds"
    return Finding(
        about.what, value, lower, upper, about.unit, about.expected, about.bound, test, len(means),
        about.unit_of_n, p, detectable, about.cells,
    )  # fmt: skip


def _from_differences(
    evidence: Evidence, terms: Sequence[tuple[StoredCell, float]], metric: str, sign: float, about: _About
) -> Finding:
    name = difference_name(metric)
    models = {cell.model for cell, _ in terms}
    if name is None or len(models) > 1 or not math.isclose(sum(s for _, s in terms), 0, abs_tol=1e-9):
        raise NotMeasured(about.what, "the outcomes of single items were not kept", is_missing=False)
    records = [(evidence.record(cell, name), share) for cell, share in terms if not cell.is_baseline]
    value, lower, upper = sum_of_independent(
        (record.value, *_bounds(record, about.what), share * sign) for record, share in records
    )
    n = max((record.n for record, _ in records), default=0)
    p, detectable = _normal(value, lower, upper, about.bound)
    return Finding(
        about.what, value, lower, upper, about.unit, about.expected, about.bound,
        "intervals against the baseline", n, about.unit_of_n, p, detectable, about.cells,
        "combined as if independent",
    )  # fmt: skip


def _normal(value: float, lower: float, upper: float, bound: float) -> tuple[float, float]:
    """The two-sided p-value and the detectable distance that a 95 % interval stands for."""
    error = (upper - lower) / (2 * _Z)
    if error == 0:
        return (1.0 if value == bound else 0.0), 0.0
    return 2 * NormalDist().cdf(-abs(value - bound) / error), (_Z + _POWER) * error


# --- times --------------------------------------------------------------------------------------------


def speedup(
    evidence: Evidence,
    model: str,
    method: str,
    scenario: str,
    phase: str,
    *,
    expected: Side,
    bound: float = 1.0,
    over: str = BASELINE,
) -> Finding:
    """How many times faster a phase is than the baseline's (or `over`'s), from rounds timed in turn.

    The record is the median of the rounds' ratios, its interval that of the rounds or of the captures. The
    p-value is read off that interval, as of a normal distribution of the logarithm, and is never below what
    as many signs can say.
    """
    name = f"{phase}_speedup"
    cell = evidence.cell(model, method, scenario)
    cells, parts = [cell], [(evidence.record(cell, name), 1.0)]
    if over != BASELINE:
        other = evidence.cell(model, over, scenario)
        evidence.require_comparable([cell, other], Scope.TIMING)
        cells.append(other)
        parts.append((evidence.record(other, name), -1.0))
    value, lower, upper = _of_logarithms(parts, f"{model} · {method} · {scenario}")
    p, distance = _normal(*(math.log(each) for each in (value, lower, upper, bound)))
    rounds = min(record.n for record, _ in parts)
    p = max(p, min(1.0, 2.0 * 0.5**rounds))
    versus = "" if over == BASELINE else f" over {over}"
    return Finding(
        f"{model} · {method}: {phase} speed-up{versus} at {scenario}",
        value, lower, upper, "x", expected, bound, "rounds in turn with the baseline", rounds, "rounds", p,
        bound * (math.exp(distance) - 1), tuple(each.id for each in cells),
    )  # fmt: skip


def _of_logarithms(parts: Sequence[tuple[Record, float]], what: str) -> tuple[float, float, float]:
    """The product of powers of records, with the interval of independent logarithms."""
    logarithms = []
    for record, power in parts:
        lower, upper = _bounds(record, what)
        if not lower > 0:
            raise NotMeasured(what, f"{record.metric} has no interval", is_missing=False)
        logarithms.append((math.log(record.value), math.log(lower), math.log(upper), power))
    value, lower, upper = map(math.exp, sum_of_independent(logarithms))
    return value, lower, upper


def _bounds(record: Record, what: str) -> tuple[float, float]:
    """The interval of a record.

    Raises:
        NotMeasured: it has none.
    """
    if record.lower is None or record.upper is None:
        raise NotMeasured(what, f"{record.metric} has no interval", is_missing=False)
    return record.lower, record.upper


def prefill_exponent(
    evidence: Evidence,
    model: str,
    method: str,
    prompts: Sequence[int],
    *,
    expected: Side,
    bound: float,
    batch: int = 1,
    new_tokens: int = 16,
    minus: str | None = None,
) -> Finding:
    """The exponent of the prefill's time over the prompt length, least squares in logarithms.

    Every time is taken in units of the control's, a fixed workload that was timed in the same rounds, so
    that a machine that was busier at one length counts for less. The interval is of the readings, not of
    the misfit to a power law.

    Args:
        minus: subtract this method's exponent at the same lengths.
    """
    x = np.log(np.array(prompts, dtype=np.float64))
    slopes = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    parts: list[tuple[Record, float]] = []
    cells: list[StoredCell] = []
    for name, sign in ((method, 1.0), (minus, -1.0)):
        if name is None:
            continue
        for prompt, slope in zip(prompts, slopes, strict=True):
            cell = evidence.cell(model, name, f"b{batch}-p{prompt}-g{new_tokens}")
            cells.append(cell)
            parts.append((evidence.record(cell, "prefill_latency"), sign * float(slope)))
            parts.append((evidence.record(cell, "control_latency"), -sign * float(slope)))
    evidence.require_comparable(cells, Scope.TIMING)
    value, lower, upper = (math.log(each) for each in _of_logarithms(parts, f"{model} · {method}"))
    p, detectable = _normal(value, lower, upper, bound)
    versus = "" if minus is None else f" minus that of {minus}"
    lengths = f"{prompts[0]} to {prompts[-1]}"
    return Finding(
        f"{model} · {method}: exponent of prefill time over {lengths} tokens{versus}",
        value, lower, upper, "", expected, bound, "intervals of the times over the control's",
        min(record.n for record, _ in parts), "readings", p, detectable, tuple(cell.id for cell in cells),
    )  # fmt: skip


# --- what has no spread -------------------------------------------------------------------------------


def exact(
    evidence: Evidence,
    model: str,
    method: str,
    place: str,
    metric: str,
    *,
    expected: Side,
    bound: float,
    over: str | None = None,
    over_place: str | None = None,
) -> Finding:
    """A count or a number of bytes, or the quotient of two: the same at every repetition.

    Args:
        over: divide by this method's record; its cell is at `over_place`, by default the same place.
    """
    cell = evidence.cell(model, method, place)
    record = evidence.record(cell, metric)
    cells, value, unit = [cell], record.value, record.unit
    what = f"{model} · {method}: {metric} at {place}"
    if over is not None:
        other = evidence.cell(model, over, over_place or place)
        evidence.require_comparable([cell, other], Scope.MEMORY)
        cells.append(other)
        value, unit = value / evidence.record(other, metric).value, "x"
        what += f" over {over}'s" if over != method else f" over that at {over_place}"
    return Finding(
        what, value, value, value, unit, expected, bound, "exact", 1, "measurement",
        cells=tuple(each.id for each in cells),
    )  # fmt: skip
