"""Records that compare a cell with the baseline's cell of the same model, seed and task.

They are computed from the stored outcomes of single items as soon as both cells are stored, in either
order, so that every comparison is paired.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.comparing.quality import weights_that_explain
from harness.errors import ConfigError
from harness.evaluate.correlation import compare_correlations
from harness.evaluate.metrics import metric_of
from harness.evaluate.paired import PairedOutcome, choice_kl, compare_paired, flips, match_items
from harness.records import CellKind, Item, Record, Status

if TYPE_CHECKING:
    from harness.grid import Grid
    from harness.store.store import Store

__all__ = ["Derivation", "baseline_records", "difference_name"]

_SHARES = frozenset({"acc", "acc_norm", "exact_match"})
log = logging.getLogger("harness.derive")


def baseline_records(
    baseline: Sequence[Item],
    variant: Sequence[Item],
    scores: tuple[Mapping[str, Record], Mapping[str, Record]] = ({}, {}),
) -> tuple[Record, ...]:
    """What the same items say about two variants: paired differences, flips, divergence of choices.

    The difference is variant minus baseline, with its paired bootstrap interval, so `nll_rise` above
    zero is a loss of quality and `acc_difference` below zero too. Beside each stand `…_p`, the raw
    p-value of the paired test, for tables to adjust over all that they show, and `…_detectable`, the
    smallest true difference that these items would show four times in five.

    Args:
        scores: the records of the baseline's and the variant's cell, by metric. Items are weighted so that
            they make up these: members of a group may count the same, whatever their size. Without them an
            item counts for its tokens.

    Raises:
        ConfigError: the two were not scored on the same items.
    """
    records: list[Record] = []
    metrics = {item.metric for item in baseline} & {item.metric for item in variant}
    for metric in sorted(metrics):
        if (name := difference_name(metric)) is not None:
            pairs = match_items(baseline, variant, metric)
            records += _differences(name, pairs, [of_side.get(metric) for of_side in scores])
    if "cosine" in metrics:
        pairs = match_items(baseline, variant, "cosine")
        a, b = [first.outcome for first, _ in pairs], [second.outcome for _, second in pairs]
        targets = [float(second.detail["target"]) for _, second in pairs]
        records += _told("spearman_difference", compare_correlations("spearman", a, b, targets))
    if "acc" in metrics:
        records.append(replace(flips(baseline, variant, "acc"), metric="flips"))
        if all("loglikelihoods" in item.detail for item in baseline if item.metric == "acc"):
            records.append(choice_kl(baseline, variant))
    return tuple(records)


def difference_name(metric: str) -> str | None:
    """What the paired difference of a metric is called; None where none is stored.

    >>> difference_name("acc"), difference_name("nll"), difference_name("exact_match,strict-match")
    ('acc_difference', 'nll_rise', 'exact_match_difference,strict-match')
    """
    if metric == "nll":
        return "nll_rise"
    name, comma, filter_name = metric.partition(",")
    if name not in _SHARES:  # a part of a task (acc_agreement) would be tested twice
        return None
    return f"{name}_difference{comma}{filter_name}"


def _differences(
    name: str, pairs: Sequence[tuple[Item, Item]], scores: Sequence[Record | None]
) -> list[Record]:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    weights = None
    values = [score.value for score in scores if score is not None]
    if len(values) == 2:
        weights = weights_that_explain(first, second, *values)
    if weights is None:
        weights = [float(item.detail.get("tokens", 1)) for item in second]
    a, b = ([item.outcome for item in side] for side in (first, second))
    return _told(name, compare_paired(a, b, weights, answers=name != "nll_rise"))


def _told(name: str, found: PairedOutcome) -> list[Record]:
    """The records of a paired comparison."""
    name, comma, filter_name = name.partition(",")
    end, n = f"{comma}{filter_name}", found.n
    unit = metric_of(name).unit
    value = found.difference.value
    # A single item says nothing of the spread.
    lower, upper = (found.difference.lower, found.difference.upper) if n > 1 else (None, None)
    records = [Record(name + end, value, unit, lower, upper, n)]
    if n > 1:
        note = "80 % power at 5 %, two-sided"
        records += [
            Record(f"{name}_p{end}", found.p, "p", n=n, note=f"{found.test}, not adjusted"),
            Record(f"{name}_detectable{end}", found.detectable, unit, n=n, note=note),
        ]
    return records


@dataclass(frozen=True, slots=True)
class _Place:
    """The cells of one model, seed and task are compared with each other's baseline."""

    model: str
    seed: int
    task: str


class Derivation:
    """Watches what is stored and writes the comparisons as soon as they can be made."""

    def __init__(self, store: Store, grid: Grid) -> None:
        self._store = store
        self._places: dict[str, tuple[_Place, bool]] = {}
        for variant in grid.variants:
            for cell in variant.cells:
                if cell.kind is CellKind.TASK and cell.task is not None:
                    place = _Place(variant.model.info.label, variant.seed, cell.task.name)
                    self._places[cell.key] = (place, variant.chain.is_baseline)
        self._baselines: dict[_Place, int] = {}
        self._waiting: dict[_Place, list[int]] = {}

    def stored(self, key: str, cell_id: int, status: Status) -> None:
        """Say that a cell is stored, by this sweep or by an earlier one.

        Reused cells are compared again too: the sweep that measured them may have been killed before
        it could, and the comparison replaces itself.
        """
        if key not in self._places or status is not Status.OK:
            return
        place, is_baseline = self._places[key]
        if is_baseline:
            self._baselines[place] = cell_id
            for waiting in self._waiting.pop(place, []):
                self._write(waiting, cell_id)
        elif place in self._baselines:
            self._write(cell_id, self._baselines[place])
        else:
            self._waiting.setdefault(place, []).append(cell_id)

    def _write(self, cell_id: int, baseline_id: int) -> None:
        try:
            records = baseline_records(
                self._store.items(baseline_id),
                self._store.items(cell_id),
                (self._store.records(baseline_id), self._store.records(cell_id)),
            )
        except ConfigError as error:
            # The data of a task changed without its revision: the cells stand, the comparison does not.
            log.warning("cell %d is not compared with the baseline: %s", cell_id, error)
            return
        if records:
            self._store.write_derived(cell_id, records)
