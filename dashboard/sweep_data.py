"""What the Sweep page shows: a store in, DataFrames and plain values out; counted in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from sqlalchemy import ColumnElement, Connection, case, func, or_, select

from harness.records import CellKind, Status
from harness.store.frames import frame_of, reading, typed
from harness.store.liveness import has_ended
from harness.store.selection import current, sweep_number
from harness.store.store import Store
from harness.store.tables import cells, imports, machines, sweep_cells, sweeps, variants

from .boards import badge
from .variant_names import variant_names

__all__ = [
    "FAILING",
    "UNWELL",
    "WAITING",
    "Failure",
    "Progress",
    "failure",
    "failures",
    "last_sweep",
    "progress",
    "resume_command",
    "retry_command",
    "status_counts",
    "status_grid",
]

FAILING = tuple(str(status) for status in Status if status.is_failure)
UNWELL = (*FAILING, str(Status.NO_EFFECT), str(Status.NOT_APPLICABLE), str(Status.SKIPPED))
"""Every status but ``ok``, what should have worked first."""

_STATES = ("running", "finished", "interrupted")

WAITING = "… waiting"
"""In place of a status: a cell that the sweep has not come to."""


def last_sweep(store: Store) -> int:
    """The newest sweep that was measured here; 0 in an empty store."""
    with reading(store) as connection:
        return sweep_number(connection, "last") or 0


# --- progress ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    `done` counts the cells that have a status; `reused` of them were measured by an earlier sweep.
    `measured` is done without reused. Times are in seconds; `elapsed_s` ends with the sweep, or where it
    was killed with its last cell. `left_s` is None unless it runs and something was measured.
    """

    sweep: int
    state: str  # running | finished | interrupted | of unknown state
    origin: str | None
    machine: str
    command: str
    started_at: str
    planned: int
    done: int
    reused: int
    ok: int
    failed: int
    elapsed_s: float
    quiet_s: float | None = None

    @property
    def is_alive(self) -> bool:
        return self.state == "running"

    @property
    def measured(self) -> int:
        return self.done - self.reused

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        return min(1.0, self.done / self.planned) if self.planned else 1.0

    @property
    def cells_per_minute(self) -> float | None:
        return 60 * self.measured / self.elapsed_s if self.measured and self.elapsed_s > 0 else None

    @property
    def left_s(self) -> float | None:
        """The cells that are left at the pace so far."""
        if not self.is_alive or not self.measured:
            return None
        return max(0, self.planned - self.done) * self.elapsed_s / self.measured


def progress(store: Store, sweep: int, now: datetime | None = None) -> Progress:
    """How far a sweep is.

    Args:
        now: the moment that a running sweep is looked at; by default this one.
    """
    own = cells.c.sweep_id == sweep
    counted = (
        select(
            func.count().label("done"),
            _count(~own).label("reused"),
            _count(cells.c.status == str(Status.OK)).label("ok"),
            _count(cells.c.status.in_(FAILING)).label("failed"),
            func.max(case((own, cells.c.id))).label("newest"),
        )
        .select_from(sweep_cells.join(cells, cells.c.id == sweep_cells.c.cell_id))
        .where(sweep_cells.c.sweep_id == sweep)
    )
    about = (
        select(
            sweeps.c.status, sweeps.c.started_at, sweeps.c.finished_at, sweeps.c.cells_planned,
            sweeps.c.command, sweeps.c.manifest, machines.c.facts, imports.c.origin,
        )
        .join(machines, machines.c.id == sweeps.c.machine_id)
        .outerjoin(imports, imports.c.sweep_id == sweeps.c.id)
        .where(sweeps.c.id == sweep)
    )  # fmt: skip
    with reading(store) as connection:
        row = connection.execute(about).one()
        counts = connection.execute(counted).one()
        last = select(cells.c.started_at, cells.c.seconds).where(cells.c.id == counts.newest)
        newest = connection.execute(last).first()
    is_dead = row.status == "running" and has_ended((row.manifest or {}).get("process"))
    # A store may say anything: only its own words reach a heading.
    state = "interrupted" if is_dead else row.status if row.status in _STATES else "of unknown state"
    started = _moment(row.started_at)
    last_cell = None if newest is None else _moment(newest.started_at).timestamp() + (newest.seconds or 0.0)
    looked = (now or datetime.now(UTC)).timestamp()
    if state == "running":
        end = looked
    elif row.finished_at:
        end = _moment(row.finished_at).timestamp()
    else:
        end = started.timestamp() if last_cell is None else last_cell
    return Progress(
        sweep=sweep,
        state=state,
        origin=row.origin,
        machine=str((row.facts or {}).get("device_name") or "a machine without a name"),
        command=row.command,
        started_at=row.started_at,
        planned=row.cells_planned,
        done=counts.done,
        reused=counts.reused,
        ok=counts.ok,
        failed=counts.failed,
        elapsed_s=max(0.0, end - started.timestamp()),
        quiet_s=None if state != "running" or last_cell is None else max(0.0, looked - last_cell),
    )


def resume_command(about: Progress) -> str | None:
    """The command that goes on with an interrupted sweep: the same one; None where nothing is left.

    A sweep that was imported, or filled by other means than the command line, has none.
    """
    return about.command if about.state == "interrupted" and about.command and about.origin is None else None


def retry_command(about: Progress) -> str | None:
    """The command that measures the failed cells again; None where there is nothing to measure again."""
    if not about.failed or not about.command or about.origin is not None or about.is_alive:
        return None
    return about.command if "--retry-failed" in about.command else f"{about.command} --retry-failed"


# --- statuses ---------------------------------------------------------------------------------


def status_counts(store: Store, sweep: int | None) -> pd.DataFrame:
    """How many cells ended how: columns status, cells, reason (the most frequent one of those not ok)."""
    reasons = (
        select(cells.c.status, cells.c.reason, func.count().label("cells"))
        .group_by(cells.c.status, cells.c.reason)
        .order_by(func.count().desc(), cells.c.reason)
    )
    with reading(store) as connection:
        frame = frame_of(connection, reasons.where(current(connection, sweep)))
    counts = frame.groupby("status", sort=False).agg(cells=("cells", "sum"), reason=("reason", "first"))
    known = [str(status) for status in (Status.OK, *map(Status, UNWELL)) if str(status) in counts.index]
    return counts.loc[known].reset_index().astype({"cells": "int64"})


def status_grid(
    store: Store, sweep: int, *, only_failing: bool = False, most: int = 300
) -> tuple[pd.DataFrame, int]:
    """The statuses of a sweep, one row a variant and one column a cell, as text with a sign.

    Variants with failures come first. A cell that a running or interrupted sweep has not come to is
    ``waiting``; the columns are those that any variant has had so far.

    Args:
        most: how many variants are returned.

    Returns:
        The grid (columns variant, then the cells) and how many variants there are in all.
    """
    with reading(store) as connection:
        ids, total = _grid_variants(connection, sweep, only_failing=only_failing, most=most)
        wanted = (
            select(
                cells.c.variant_id.label("variant"), cells.c.kind, cells.c.task, cells.c.scenario,
                cells.c.status,
            )
            .where(current(connection, sweep), cells.c.variant_id.in_(ids))
            .order_by(cells.c.id)
        )  # fmt: skip
        found = frame_of(connection, wanted)
        columns = (variants.c.model, variants.c.method, variants.c.seed, variants.c.dtype)
        about = frame_of(
            connection,
            select(variants.c.id.label("variant"), *columns).where(variants.c.id.in_(ids)),
        )
    place = found["task"].where(found["task"].notna(), found["scenario"])
    found["place"] = place.where(place.notna(), found["kind"])
    order = {str(kind): number for number, kind in enumerate(CellKind)}
    places = sorted(
        {(order[kind], where) for kind, where in zip(found["kind"], found["place"], strict=True)},
        key=lambda pair: (pair[0], _natural(pair[1])),
    )
    by_place = found.drop_duplicates(["variant", "place"], keep="last")
    grid = by_place.pivot(index="variant", columns="place", values="status")
    grid = grid.reindex(index=ids, columns=list(dict.fromkeys(where for _, where in places)))
    shown = grid.astype(object).map(badge, na_action="ignore")
    shown = shown.where(shown.notna(), WAITING)
    names = variant_names(about)
    shown.insert(0, "variant", [names[id_] for id_ in shown.index])
    return shown.reset_index(drop=True), total


def _grid_variants(
    connection: Connection, sweep: int, *, only_failing: bool, most: int
) -> tuple[list[int], int]:
    """The variants of a sweep, failing ones first, and their number."""
    failing = func.sum(case((cells.c.status.in_(FAILING), 1), else_=0))
    of_sweep = (
        select(cells.c.variant_id.label("variant"), failing.label("failing"))
        .join(sweep_cells, sweep_cells.c.cell_id == cells.c.id)
        .where(sweep_cells.c.sweep_id == sweep)
        .group_by(cells.c.variant_id)
        .subquery()
    )
    # A variant that the sweep made is written at its start, before any of its cells.
    found = (
        select(variants.c.id, func.coalesce(of_sweep.c.failing, 0))
        .outerjoin(of_sweep, of_sweep.c.variant == variants.c.id)
        .where(or_(variants.c.sweep_id == sweep, of_sweep.c.variant.is_not(None)))
        .order_by(func.coalesce(of_sweep.c.failing, 0).desc(), variants.c.id)
    )
    rows = [(id_, count) for id_, count in connection.execute(found) if count or not only_failing]
    return [id_ for id_, _ in rows[:most]], len(rows)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts ``b8-p512`` before ``b64-p128``."""
    parts = "".join(each if each.isdecimal() else f" {each} " for each in text).split()
    joined: list[tuple[int, int, str]] = []
    for part in parts:
        joined.append((0, int(part), "") if part.isdecimal() else (1, 0, part))
    return joined


# --- failures ---------------------------------------------------------------------------------


def failures(
    store: Store, sweep: int | None, statuses: Sequence[str] = (), most: int = 1000
) -> tuple[pd.DataFrame, int]:
    """The cells that are not ok: first those that should have been, then the newest first.

    Args:
        sweep: a sweep's cells; None means the newest of each key.
        statuses: of `UNWELL`; none means all.
        most: how many rows are returned.

    Returns:
        Columns status, model, method, place, reason, seconds, sweep, started_at and cell; and how many
        there are in all.
    """
    expected = case((cells.c.status.in_(FAILING), 0), else_=1)
    query = (
        select(
            cells.c.status, variants.c.model, variants.c.method,
            func.coalesce(cells.c.task, cells.c.scenario, cells.c.kind).label("place"),
            cells.c.reason, cells.c.seconds, cells.c.sweep_id.label("sweep"), cells.c.started_at,
            cells.c.id.label("cell"),
        )
        .join(variants, variants.c.id == cells.c.variant_id)
        .order_by(expected, cells.c.id.desc())
        .limit(most)
    )  # fmt: skip
    wanted = cells.c.status.in_(list(statuses or UNWELL))
    with reading(store) as connection:
        condition = wanted & current(connection, sweep)
        frame = frame_of(connection, query.where(condition))
        total = connection.scalar(select(func.count()).select_from(cells).where(condition)) or 0
    frame["started_at"] = [str(moment)[:19].replace("T", " ") for moment in frame["started_at"]]
    return typed(frame, floats=("seconds",), integers=("sweep", "cell")), int(total)


@dataclass(frozen=True)
class Failure:
    """What is known of one cell that is not ok."""

    reason: str | None
    traceback: str | None
    log_tail: str | None


def failure(store: Store, cell: int) -> Failure:
    """Reason, traceback and the end of the worker's log of one cell."""
    query = select(cells.c.reason, cells.c.traceback, cells.c.log_tail).where(cells.c.id == cell)
    with reading(store) as connection:
        return Failure(*connection.execute(query).one())


def _count(condition: ColumnElement[bool]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
