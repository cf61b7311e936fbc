"""What a variant of a finished sweep cost besides loading, transforming, measuring and scoring.

    python -m harness.fixed_cost results.db

Read from the store of a sweep with one worker at a time: the wall-clock time from the first cell of a variant
to that of the next, less the seconds of the cells between and the `load_s` and `transform_s` of the next.
What is left is starting and ending processes, plugins, the measurement of the effect, and the store.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select

from harness.errors import ConfigError
from harness.store.store import Store
from harness.store.tables import cells, records, sweeps, variants

__all__ = ["CellTime", "FixedCost", "fixed_costs", "main", "read_cell_times"]

_MAKING = ("load_s", "transform_s")


@dataclass(frozen=True, slots=True)
class CellTime:
    """When a cell was measured and how long it took; of a transform cell, how long making took."""

    variant: str
    started_at: datetime
    seconds: float
    making_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FixedCost:
    """A further variant of a sweep: everything between the variant before and its own first cell."""

    variant: str
    fixed_s: float


def fixed_costs(times: Sequence[CellTime]) -> list[FixedCost]:
    """The fixed cost of every variant but the first, from the cells of a sweep with one worker: pure."""
    of_variant: dict[str, list[CellTime]] = {}
    for time in sorted(times, key=lambda time: time.started_at):
        of_variant.setdefault(time.variant, []).append(time)
    groups = list(of_variant.values())
    found = []
    for before, own in itertools.pairwise(groups):
        whole = (own[0].started_at - before[0].started_at).total_seconds()
        working = _spent_s(before) + sum(time.making_s for time in own)
        found.append(FixedCost(own[0].variant, whole - working))
    return found


def _spent_s(times: Sequence[CellTime]) -> float:
    """The seconds of a variant's cells. Where making it failed, each of them holds all that this took: what
    began at one moment counts once."""
    longest: dict[datetime, float] = {}
    for time in times:
        longest[time.started_at] = max(time.seconds, longest.get(time.started_at, 0.0))
    return sum(longest.values())


def read_cell_times(store: Store, sweep: int | None = None) -> list[CellTime]:
    """The cells that a sweep measured itself; by default the newest sweep.

    Raises:
        ConfigError: there is no such sweep, or it ran several workers at a time.
    """
    with store.reading() as connection:
        wanted = select(sweeps.c.id, sweeps.c.config).order_by(sweeps.c.id.desc()).limit(1)
        if sweep is not None:
            wanted = wanted.where(sweeps.c.id == sweep)
        found = connection.execute(wanted).first()
        if found is None:
            raise ConfigError("the store has no such sweep")
        if found.config.get("jobs", 1) != 1:
            raise ConfigError(f"sweep {found.id} ran several workers at a time: their times overlap")
        making: dict[int, float] = {}
        for row in connection.execute(
            select(records.c.cell_id, records.c.value)
            .join(cells, cells.c.id == records.c.cell_id)
            .where(cells.c.sweep_id == found.id, records.c.metric.in_(_MAKING))
        ):
            making[row.cell_id] = making.get(row.cell_id, 0.0) + row.value
        rows = connection.execute(
            select(cells, variants.c.method, variants.c.model)
            .join(variants, variants.c.id == cells.c.variant_id)
            .where(cells.c.sweep_id == found.id, cells.c.started_at != "")
        )
        return [
            CellTime(
                f"{row.model} {row.method} ({row.variant_id})",
                datetime.fromisoformat(row.started_at),
                row.seconds,
                making.get(row.id, 0.0),
            )
            for row in rows
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m harness.fixed_cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("store", nargs="?", default="results.db")
    parser.add_argument("--sweep", type=int, help="its number; the newest by default")
    given = parser.parse_args(arguments)
    with Store.open_readonly(given.store) as store:
        for cost in fixed_costs(read_cell_times(store, given.sweep)):
            print(f"{cost.fixed_s:8.2f} s  {cost.variant}")


if __name__ == "__main__":
    main()
