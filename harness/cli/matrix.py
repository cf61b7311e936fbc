"""``harness sweep --dry-run``: the matrix, what each variant needs, and how long it may take."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

from harness.cli.output import Format, print_rows, say

if TYPE_CHECKING:
    from harness.grid import CellPlan, VariantPlan
    from harness.planning import SweepPlan

__all__ = ["print_matrix"]


def print_matrix(plan: SweepPlan, target: str) -> None:
    """Print one row a variant; nothing is loaded, run or written."""
    from harness.sweep import cells_to_run

    history = _History.read(plan, target)
    to_run, reused = cells_to_run(plan, history.finished)
    rows = [_row(variant, to_run, history) for variant in plan.grid.variants]
    columns = ["model", "method", "seed", "needs", "to measure", "already measured", "not possible"]
    print_rows(rows, [*columns, "estimate"], Format.TABLE)
    for row in rows:
        if row["reason"]:
            say(f"{row['model']} · {row['method']}: {row['reason']}")
    say(
        f"{len(plan.grid.cells)} cells on {plan.device_name} in {plan.dtype}: {len(to_run)} to "
        f"measure, {len(reused)} already measured; nothing was run"
    )


def _row(variant: VariantPlan, to_run: frozenset[str], history: _History) -> dict[str, Any]:
    refused = [cell for cell in variant.cells if cell.decision is not None]
    open_cells = [cell for cell in variant.cells if cell.key in to_run and cell.decision is None]
    estimates = [history.seconds(variant, cell) for cell in open_cells]
    known = [estimate for estimate in estimates if estimate is not None]
    reasons = Counter(cell.decision.reason for cell in refused if cell.decision is not None)
    info = variant.model.info
    needs = set(variant.chain.needs()) | ({"training"} if info.scratch else set())
    return {
        "model": info.label,
        "method": variant.chain.label,
        "seed": variant.seed,
        "needs": ", ".join(sorted(needs)) or "nothing",
        "to measure": ", ".join(cell.label for cell in open_cells) or "nothing",
        "already measured": sum(cell.key not in to_run for cell in variant.cells),
        "not possible": len(refused),
        "reason": "; ".join(reasons),
        "estimate": _estimate(known, len(open_cells)),
    }


def _estimate(known: list[float], count: int) -> str:
    if not count:
        return "0 s"
    if not known:
        return "unknown"
    return f"{'at least ' if len(known) < count else ''}{sum(known):.0f} s"


class _History:
    """What the store knows: finished cells, and how long cells like these took before."""

    def __init__(self, finished: dict[str, Any], seconds: dict[tuple[str, str], float]) -> None:
        self.finished, self._seconds = finished, seconds

    @classmethod
    def read(cls, plan: SweepPlan, target: str) -> _History:
        from harness.store.durations import durations
        from harness.store.store import Store

        if "://" not in target and not os.path.exists(target):
            return cls({}, {})
        with Store.open_readonly(target) as store:
            finished = store.finished_cells(cell.key for cell in plan.grid.cells)
            seconds: dict[tuple[str, str], list[float]] = {}
            for each in durations(store):
                seconds.setdefault((each.model, each.cell), []).append(each.seconds)
        return cls(finished, {key: statistics.median(each) for key, each in seconds.items()})

    def seconds(self, variant: VariantPlan, cell: CellPlan) -> float | None:
        """The median of what this kind of cell took on this model; None where it is unknown."""
        return self._seconds.get((variant.model.info.label, cell.label))
