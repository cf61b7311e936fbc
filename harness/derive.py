"""Records that compare a cell with the baseline's cell of the same model, seed and task.

They are computed from the stored outcomes of single items as soon as both cells are stored, in either
order, so that every comparison is paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.evaluate.paired import choice_kl, flips, match_items, paired_bootstrap_difference
from harness.records import CellKind, Item, Record, Status

if TYPE_CHECKING:
    from harness.grid import Grid
    from harness.store.store import Store

__all__ = ["Derivation", "baseline_records"]

_DIFFERENCES = {"acc": ("acc_difference", "fraction"), "nll": ("nll_rise", "nats/token")}


def baseline_records(baseline: Sequence[Item], variant: Sequence[Item]) -> tuple[Record, ...]:
    """What the same items say about two variants: paired differences, flips, divergence of choices.

    The difference is variant minus baseline, with its paired bootstrap interval, so `nll_rise` above
    zero is a loss of quality and `acc_difference` below zero too.

    Raises:
        ConfigError: the two were not scored on the same items.
    """
    records = []
    metrics = {item.metric for item in baseline} & {item.metric for item in variant}
    for metric, (name, unit) in _DIFFERENCES.items():
        if metric not in metrics:
            continue
        pairs = match_items(baseline, variant, metric)
        weights = [float(b.detail.get("tokens", 1)) for _, b in pairs]
        difference = paired_bootstrap_difference(
            [a.outcome for a, _ in pairs], [b.outcome for _, b in pairs], 0, weights
        )
        records.append(Record(name, *_of(difference, unit), n=len(pairs)))
    if "acc" in metrics:
        records.append(replace(flips(baseline, variant, "acc"), metric="flips"))
        if all("loglikelihoods" in item.detail for item in baseline if item.metric == "acc"):
            records.append(choice_kl(baseline, variant))
    return tuple(records)


def _of(difference: Sequence[float], unit: str) -> tuple[float, str, float, float]:
    value, lower, upper = difference
    return value, unit, lower, upper


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
        records = baseline_records(self._store.items(baseline_id), self._store.items(cell_id))
        if records:
            self._store.write_derived(cell_id, records)
