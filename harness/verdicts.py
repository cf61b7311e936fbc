"""Verdicts on the variants of a sweep, written as soon as a cell and its baseline's are both stored.

A verdict is a derived record of the variant's scenario cell, ``verdict``: 1 where something needs an
explanation (slower, or no smaller), else 0, with the words as its note. A record, because records are the
one thing that may be added to a finished cell, and because tables, exports and the dashboard show them
already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.measure.verdict import judge
from harness.measure.verdict_facts import CellFacts, VariantFacts
from harness.records import CellKind, Record, Status

if TYPE_CHECKING:
    from harness.grid import Grid
    from harness.measure.ceilings import Ceilings
    from harness.store.store import Store

__all__ = ["Verdicts"]

FINE = "smaller than the baseline, and not measurably slower"


@dataclass(frozen=True, slots=True)
class _Place:
    """The cells of one model, seed and shape are compared with each other's baseline."""

    model: str
    seed: int
    shape: str


@dataclass(frozen=True, slots=True)
class _Cell:
    place: _Place
    variant: str
    dtype: str
    is_baseline: bool


class Verdicts:
    """Watches what is stored and writes each verdict as soon as it can be made."""

    def __init__(self, store: Store, grid: Grid, ceilings: Ceilings) -> None:
        self._store, self._ceilings = store, ceilings
        self._cells: dict[str, _Cell] = {}
        self._transforms: dict[str, str] = {}  # cell keys to variants
        self._transform_ids: dict[str, int] = {}  # by variant
        for variant in grid.variants:
            for cell in variant.cells:
                if cell.kind is CellKind.TRANSFORM:
                    self._transforms[cell.key] = variant.key
                elif cell.scenario is not None:
                    place = _Place(variant.model.info.label, variant.seed, cell.scenario.label)
                    self._cells[cell.key] = _Cell(
                        place, variant.key, variant.dtype, variant.chain.is_baseline
                    )
        self._baselines: dict[_Place, int] = {}
        self._waiting: dict[_Place, list[tuple[int, _Cell]]] = {}

    def stored(self, key: str, cell_id: int, status: Status) -> None:
        """Say that a cell is stored, by this sweep or by an earlier one.

        Reused cells are judged again too: the words may have become better, and the record replaces
        itself.
        """
        if status is not Status.OK:
            return
        if key in self._transforms:
            self._transform_ids[self._transforms[key]] = cell_id
            return
        cell = self._cells.get(key)
        if cell is None:
            return
        if cell.is_baseline:
            self._baselines[cell.place] = cell_id
            for waiting_id, waiting in self._waiting.pop(cell.place, []):
                self._write(waiting_id, waiting, cell_id)
        elif cell.place in self._baselines:
            self._write(cell_id, cell, self._baselines[cell.place])
        else:
            self._waiting.setdefault(cell.place, []).append((cell_id, cell))

    def _write(self, cell_id: int, cell: _Cell, baseline_id: int) -> None:
        transform_id = self._transform_ids.get(cell.variant)
        effects, simulated = self._store.effects(cell.variant)
        facts = VariantFacts(
            effects=effects,
            records=None if transform_id is None else self._store.records(transform_id),
            simulated=simulated,
            dtype=cell.dtype,
            shape=cell.place.shape,
        )
        found = judge(self._facts(cell_id), self._facts(baseline_id), facts, self._ceilings)
        needs_words = bool(found.slower) or found.no_smaller
        record = Record("verdict", float(needs_words), "1", note=found.text or FINE)
        self._store.write_derived(cell_id, [record])

    def _facts(self, cell_id: int) -> CellFacts:
        return CellFacts(self._store.records(cell_id), self._store.kernels(cell_id))
