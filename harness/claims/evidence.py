"""The rows that a claim is decided by: cells of one setting, found by model, method, place and seed.

A setting is what rows must share to stand side by side: device, type, versions, and where they were
measured. What tells two cells apart beyond that (threads, clocks, task data, budgets) is asked for each pair
that is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.claims.claim import SweepNeed
from harness.comparability import Conditions, Scope, differences
from harness.errors import HarnessError
from harness.records import Item, Record

__all__ = ["Evidence", "Incomparable", "NotMeasured", "StoredCell"]

TRANSFORM = "transform"


class NotMeasured(HarnessError):
    """A row that a claim needs is not there, or has no such record. `is_missing`: a run could measure it."""

    def __init__(self, what: str, reason: str = "", *, is_missing: bool = True) -> None:
        super().__init__(f"{what}: {reason}" if reason else what)
        self.what, self.reason, self.is_missing = what, reason, is_missing


class Incomparable(HarnessError):
    """Two rows that were measured under conditions that keep them from being compared."""


@dataclass(frozen=True)
class StoredCell:
    """A stored cell with its records by metric. `task` and `scenario` are both None for a transform's."""

    id: int
    model: str
    method: str
    seed: int
    status: str
    reason: str | None
    task: str | None
    scenario: str | None
    is_baseline: bool
    records: Mapping[str, Record] = field(repr=False)
    conditions: Conditions = field(repr=False)
    origin: str | None = None

    @property
    def place(self) -> str:
        return self.task or self.scenario or TRANSFORM

    @property
    def limit(self) -> int | None:
        return self.conditions.limit if self.task is not None else None

    @property
    def training(self) -> dict[str, str] | None:
        """The budget that trained the variant (steps, batch_size, len); None where nothing was trained."""
        return self._budget("training")

    @property
    def calibration(self) -> dict[str, str] | None:
        """The budget that calibrated the variant (samples, len); None where it needed none."""
        return self._budget("calibration")

    def _budget(self, name: str) -> dict[str, str] | None:
        text = self.conditions.facts.get(name)
        return None if text is None else dict(part.split(" ", 1) for part in str(text).split(", "))


class Evidence:
    """What a claim's `decide` gets.

    Args:
        cells: of one setting, in the order of measuring.
        items: the outcomes of the items of a cell by its id.
        device: ``cpu`` or ``cuda``.
        device_name: the device's own name.
    """

    def __init__(
        self,
        cells: Sequence[StoredCell],
        items: Callable[[int], Sequence[Item]],
        device: str,
        device_name: str = "",
    ) -> None:
        self.cells = tuple(cells)
        self.items = items
        self.device, self.device_name = device, device_name
        self._found: dict[tuple[str, str, str, int], StoredCell] = {}
        for cell in self.cells:  # of several the newest, but one that is ok before one that is not
            key = cell.model, cell.method, cell.place, cell.seed
            known = self._found.get(key)
            if known is None or cell.status == "ok" or known.status != "ok":
                self._found[key] = cell

    def narrowed(self, needs: Sequence[SweepNeed]) -> Evidence:
        """Only what belongs to these grids, measured as they ask."""
        kept = [cell for cell in self.cells if any(need.accepts(cell) for need in needs)]
        return Evidence(kept, self.items, self.device, self.device_name)

    def cell(self, model: str, method: str, place: str = TRANSFORM, seed: int = 0) -> StoredCell:
        """The ok cell of a method, by its label; `place` is a task, a shape (``b1-p64-g16``) or transform.

        Raises:
            NotMeasured: there is none, or it has another status (with the reason).
        """
        found = self._found.get((model, method, place, seed))
        what = f"{model} · {method} · {place}" + (f" · seed {seed}" if seed else "")
        if found is None:
            raise NotMeasured(what)
        if found.status != "ok":
            reason = f"{found.status.replace('_', ' ')} ({found.reason})" if found.reason else found.status
            raise NotMeasured(what, reason, is_missing=False)
        return found

    def record(self, cell: StoredCell, metric: str) -> Record:
        """A record of a cell.

        Raises:
            NotMeasured: the cell has none of this name.
        """
        if metric not in cell.records:
            what = f"{cell.model} · {cell.method} · {cell.place}"
            raise NotMeasured(what, f"it has no {metric}", is_missing=False)
        return cell.records[metric]

    def require_comparable(self, cells: Sequence[StoredCell], scope: Scope) -> None:
        """Raise `Incomparable` where something keeps two of the cells from being compared.

        Cells of different models are allowed to differ in the files of the model. Times that were imported
        from different files are never compared: one name of a processor is not one machine.
        """
        first = cells[0]
        for other in cells[1:]:
            if scope is Scope.TIMING and first.origin != other.origin:
                raise Incomparable(
                    f"{first.place} and {other.place} were timed in {first.origin} and {other.origin}"
                )
            found = [
                each
                for each in differences(first.conditions, other.conditions, scope)
                if not (each.name == "model files" and first.model != other.model)
            ]
            if found:
                raise Incomparable(
                    f"{first.model} · {first.method} and {other.model} · {other.method} ({other.place}) "
                    f"differ in {'; '.join(map(str, found))}"
                )
