"""The writer of a results store.

One process writes (the parent of a sweep); a second sweep on the same store waits for its turn.
Every `write_*` is one transaction that is on disk when it returns, so a process that is killed at
any moment loses at most the cell that it was writing, and that one whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from harness.errors import StoreError
from harness.records import CellKind, CellResult, Item, KernelUse, ModuleEffect, Record, Status, VariantReport
from harness.store.catalogue import add_to_catalogue
from harness.store.chunks import chunks
from harness.store.encoding import dump_json, nan_if_null
from harness.store.failures import translated
from harness.store.opening import label, locate, open_reader, open_writer
from harness.store.rows import FinishedCell, VariantRow
from harness.store.statements import (
    insert_kernels,
    insert_many,
    insert_once,
    insert_records,
    insert_row,
    locked,
    set_simulated,
)
from harness.store.tables import (
    cells,
    effects,
    items,
    kernels,
    machines,
    records,
    samples,
    sweep_cells,
    sweeps,
    variants,
)

__all__ = ["MACHINE_KEYS", "FinishedCell", "Store", "VariantRow"]

MACHINE_KEYS = ("machine", "device", "device_name", "cpu")
"""The entries of a manifest that say which machine it was; they must not hold what changes by the
minute (clocks, temperatures)."""

_WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Store:
    """A results store, open for writing or only for reading; a context manager.

    Every method raises `StoreError`, in one line, for what the database refuses: a full disk, a
    lock held for too long, a damaged file, a store that was opened read-only.
    """

    engine: Engine
    label: str
    read_only: bool

    def __init__(self, engine: Engine, label: str, *, read_only: bool) -> None:
        self.engine, self.label, self.read_only = engine, label, read_only

    @classmethod
    def open(cls, target: str | Path) -> Store:
        """Open for writing; create what is missing, migrate (after a backup) what is older.

        Args:
            target: a path, or a SQLAlchemy URL (``postgresql://user@host/name``).

        Raises:
            StoreError: not a store, of a newer version, locked; its directory missing or read-only.
            MissingExtra: a URL whose driver is not installed.
        """
        place = locate(target)
        return cls(open_writer(place), label(place), read_only=False)

    @classmethod
    def open_readonly(cls, target: str | Path) -> Store:
        """Open an existing store so that nothing can be written through it.

        Raises:
            StoreError: missing, empty, not a store, older or newer than this version.
            MissingExtra: a URL whose driver is not installed.
        """
        place = locate(target)
        return cls(open_reader(place), label(place), read_only=True)

    def close(self) -> None:
        """Give back all connections; the write-ahead log is folded into the file."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.read_only and isinstance(error, _WRONG_VALUES):
                self._blame_damage(error)
        finally:
            self.close()

    def _blame_damage(self, error: BaseException) -> None:
        """Raise a `StoreError` where what went wrong while reading is explained by damage to the store."""
        from harness.store.soundness import first_fault

        if fault := first_fault(self.engine):
            raise StoreError(
                f"results store {self.label}: damaged ({fault}); restore a backup, or sweep into a new one"
            ) from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state of the store until it ends."""
        with translated(self.label), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is committed when it ends well, and undone when it does not."""
        if self.read_only:
            raise StoreError(f"results store {self.label} is open read-only")
        writer = self.engine.execution_options(harness_write=True)
        with translated(self.label), writer.begin() as connection:
            yield connection

    # --- sweeps -------------------------------------------------------------------------------

    def open_sweep(
        self,
        *,
        command: str,
        config: Mapping[str, Any],
        manifest: Mapping[str, Any],
        cells_planned: int,
    ) -> int:
        """Store that a sweep begins; returns its id. The machine is known by `MACHINE_KEYS`."""
        facts = {name: manifest[name] for name in MACHINE_KEYS if name in manifest}
        with self.writing() as connection:
            machine_id = self.machine_id(connection, facts)
            sweep = {
                "machine_id": machine_id,
                "command": command,
                "config": dict(config),
                "manifest": dict(manifest),
                "cells_planned": cells_planned,
                "status": "running",
                "started_at": _now(),
            }
            return insert_row(connection, sweeps, sweep)

    @staticmethod
    def machine_id(connection: Connection, facts: Mapping[str, Any]) -> int:
        """The id of the machine with these facts, stored where it is new."""
        canonical = dump_json(dict(sorted(facts.items())))
        fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        rest = {"facts": dict(facts), "first_seen_at": _now()}
        return insert_once(connection, machines, {"fingerprint": fingerprint}, rest)

    def close_sweep(self, sweep_id: int, status: str, manifest_end: Mapping[str, Any] | None = None) -> None:
        """Store how a sweep ended: ``finished`` or ``interrupted``."""
        if status not in ("finished", "interrupted"):
            raise StoreError(f"a sweep ends finished or interrupted, not {status!r}")
        values: dict[str, Any] = {"status": status, "finished_at": _now()}
        if manifest_end is not None:
            values["manifest_end"] = dict(manifest_end)
        with self.writing() as connection:
            done = connection.execute(update(sweeps).where(sweeps.c.id == sweep_id).values(values))
            if not done.rowcount:
                raise StoreError(f"results store {self.label}: no sweep {sweep_id}")

    def finished_cells(self, keys: Iterable[str]) -> dict[str, FinishedCell]:
        """The newest cell of each key that has one, whatever its status."""
        found: dict[str, FinishedCell] = {}
        with self.reading() as connection:
            for chunk in chunks(list(keys)):
                newest = select(func.max(cells.c.id)).where(cells.c.key.in_(chunk)).group_by(cells.c.key)
                query = select(cells.c.id, cells.c.key, cells.c.status, cells.c.reason)
                for id_, key, status, reason in connection.execute(query.where(cells.c.id.in_(newest))):
                    found[key] = FinishedCell(id_, key, Status(status), reason)
        return found

    def link_cells(self, sweep_id: int, cell_ids: Iterable[int]) -> None:
        """Count cells of earlier sweeps to this one too; linking twice changes nothing."""
        wanted = set(cell_ids)
        with self.writing() as connection:
            known = select(sweep_cells.c.cell_id).where(sweep_cells.c.sweep_id == sweep_id)
            wanted -= set(connection.scalars(known))
            insert_many(
                connection,
                sweep_cells,
                [{"sweep_id": sweep_id, "cell_id": cell_id} for cell_id in sorted(wanted)],
            )

    # --- variants -----------------------------------------------------------------------------

    def write_variant(self, sweep_id: int, variant: VariantRow) -> int:
        """Store a variant; returns its id, also where its key is already there (then only
        `simulated` is brought up to date, where it is known)."""
        row = {field.name: getattr(variant, field.name) for field in fields(variant)}
        row |= {
            "sweep_id": sweep_id,
            "chain": [dict(step) for step in variant.chain],
            "model_info": dict(variant.model_info),
        }
        key = {"key": row.pop("key")}
        with self.writing() as connection:
            variant_id = insert_once(connection, variants, key, row)
            if variant.simulated is not None:
                set_simulated(connection, variant_id, variant.simulated)
            return variant_id

    def write_effects(self, variant_key: str, report: VariantReport) -> None:
        """Store what a transform did, in place of what an earlier sweep found."""
        with self.writing() as connection:
            # Locked, because another sweep on a server may be storing what it found of this variant.
            variant_id = self._variant_id(connection, variant_key, lock=True)
            connection.execute(delete(effects).where(effects.c.variant_id == variant_id))
            rows = [
                {field.name: getattr(effect, field.name) for field in fields(effect)}
                | {"variant_id": variant_id, "position": position}
                for position, effect in enumerate(report.effects)
            ]
            insert_many(connection, effects, rows)
            set_simulated(connection, variant_id, report.simulated)

    # --- cells --------------------------------------------------------------------------------

    def write_cell(
        self,
        sweep_id: int,
        result: CellResult,
        *,
        kind: CellKind,
        task: str | None,
        scenario: str | None,
    ) -> int:
        """Store a finished cell with its records, samples, items and kernels, all or nothing.

        Returns its id.

        Raises:
            StoreError: also for an unknown variant or sweep, and for two outcomes of one item.
        """
        _refuse_doubles(result)
        with self.writing() as connection:
            cell = {
                "key": result.key,
                "variant_id": self._variant_id(connection, result.variant_key),
                "sweep_id": sweep_id,
                "kind": str(kind),
                "task": task,
                "scenario": scenario,
                "status": str(result.status),
                "reason": result.reason,
                "traceback": result.traceback,
                "log_tail": result.log_tail,
                "started_at": result.started_at or _now(),
                "seconds": result.seconds,
            }
            cell_id = insert_row(connection, cells, cell)
            connection.execute(insert(sweep_cells), {"sweep_id": sweep_id, "cell_id": cell_id})
            insert_records(connection, cell_id, result.records)
            rows = [
                {
                    "cell_id": cell_id,
                    "metric": item.metric,
                    "position": item.index,
                    "outcome": item.outcome,
                    "detail": dict(item.detail),
                }
                for item in result.items
            ]
            insert_many(connection, items, rows)
            insert_kernels(connection, cell_id, result.kernels)
            add_to_catalogue(connection, [cell_id])
        return cell_id

    def write_derived(self, cell_id: int, records_: Iterable[Record]) -> None:
        """Add records that follow from stored ones (flips against the baseline) to a cell, in place
        of its records of the same metrics."""
        derived = list(records_)
        with self.writing() as connection:
            # Locked, or two sweeps that compare the same cell would each add their records.
            connection.execute(locked(select(cells.c.id).where(cells.c.id == cell_id)))
            old = (
                select(records.c.id)
                .where(records.c.cell_id == cell_id)
                .where(records.c.metric.in_([record.metric for record in derived]))
            )
            old_ids = list(connection.scalars(old))
            connection.execute(delete(samples).where(samples.c.record_id.in_(old_ids)))
            connection.execute(delete(records).where(records.c.id.in_(old_ids)))
            insert_records(connection, cell_id, derived)
            add_to_catalogue(connection, [cell_id])

    def items(self, cell_id: int) -> list[Item]:
        """The outcomes of a cell by metric, then by item."""
        query = (
            select(items.c.position, items.c.metric, items.c.outcome, items.c.detail)
            .where(items.c.cell_id == cell_id)
            .order_by(items.c.metric, items.c.position)
        )
        with self.reading() as connection:
            return [
                Item(position, metric, nan_if_null(outcome), detail)
                for position, metric, outcome, detail in connection.execute(query)
            ]

    def effects(self, variant_key: str) -> tuple[tuple[ModuleEffect, ...], bool]:
        """What the transform of a variant did to each module, and whether any of it is simulated."""
        names = tuple(field.name for field in fields(ModuleEffect))
        query = select(*(effects.c[name] for name in names)).order_by(effects.c.position)
        with self.reading() as connection:
            variant_id = self._variant_id(connection, variant_key)
            rows = connection.execute(query.where(effects.c.variant_id == variant_id))
            found = tuple(ModuleEffect(*row) for row in rows)
            simulated = select(variants.c.simulated).where(variants.c.id == variant_id)
            return found, bool(connection.scalar(simulated))

    def records(self, cell_id: int) -> dict[str, Record]:
        """The records of a cell by metric, without their raw readings."""
        names = ("metric", "value", "unit", "lower", "upper", "n", "mode", "note")
        columns = [records.c[name] for name in names]
        query = select(*columns).where(records.c.cell_id == cell_id).order_by(records.c.id)
        with self.reading() as connection:
            return {
                metric: Record(metric, nan_if_null(value), unit, lower, upper, n, mode=mode, note=note)
                for metric, value, unit, lower, upper, n, mode, note in connection.execute(query)
            }

    def kernels(self, cell_id: int) -> tuple[KernelUse, ...]:
        """The kernels of a cell, prefill before decode, the slowest first."""
        names = tuple(field.name for field in fields(KernelUse))
        query = (
            select(*(kernels.c[name] for name in names))
            .where(kernels.c.cell_id == cell_id)
            .order_by(kernels.c.phase.desc(), kernels.c.position)
        )
        with self.reading() as connection:
            return tuple(KernelUse(*row) for row in connection.execute(query))

    def _variant_id(self, connection: Connection, key: str, *, lock: bool = False) -> int:
        query = select(variants.c.id).where(variants.c.key == key)
        found: int | None = connection.scalar(locked(query) if lock else query)
        if found is None:
            raise StoreError(f"results store {self.label}: no variant {key!r}; write it first")
        return found


def _refuse_doubles(result: CellResult) -> None:
    counted = Counter((item.metric, item.index) for item in result.items)
    if doubles := [pair for pair, count in counted.items() if count > 1]:
        metric, index = doubles[0]
        raise StoreError(
            f"cell {result.key}: item {index} has two outcomes of {metric!r}, "
            "so comparisons could not be paired"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
