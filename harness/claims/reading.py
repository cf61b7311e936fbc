"""From a store to evidence: the cells that claims ask for, by setting, and nothing else of the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import or_, select

from harness.claims.claim import Claim, SweepNeed
from harness.claims.evidence import Evidence, StoredCell
from harness.comparability import Conditions
from harness.conditions import read_conditions
from harness.records import CellKind, Item, Record
from harness.store.chunks import chunks
from harness.store.encoding import nan_if_null
from harness.store.selection import current
from harness.store.store import Store
from harness.store.tables import cells, imports, records, variants

__all__ = ["read_evidence"]

_SHARED = ("device", "dtype", "measuring", "harness", "torch", "transformers", "lm_eval", "tokenizers")


class _Setting(NamedTuple):
    """What the rows of one evidence share; `facts` in the order of `_SHARED`."""

    device: str
    is_imported: bool
    facts: tuple[str, ...]


def read_evidence(store: Store, claims: Iterable[Claim]) -> list[Evidence]:
    """The rows that these claims are about, one evidence a setting: measured here first, the newest first."""
    needs = [need for claim in claims for need in claim.sweep]
    rows = _read_cells(store, needs)
    conditions = read_conditions(store, [row.id for row in rows])
    of_cells = _read_records(store, [row.id for row in rows])
    found: dict[_Setting, list[StoredCell]] = {}
    for row in rows:
        about = conditions[row.id]
        cell = StoredCell(
            id=row.id,
            model=row.model,
            method=row.method,
            seed=row.seed,
            status=row.status,
            reason=row.reason,
            task=row.task,
            scenario=row.scenario,
            is_baseline=row.family == "baseline",
            records=of_cells.get(row.id, {}),
            conditions=about,
            origin=row.origin,
        )
        found.setdefault(_setting(row, about), []).append(cell)
    items = lru_cache(maxsize=256)(lambda cell: _items(store, cell))
    ordered = sorted(found.items(), key=lambda pair: (pair[0].is_imported, -pair[1][-1].id))
    return [Evidence(of_setting, items, setting.device, setting.facts[0]) for setting, of_setting in ordered]


def _setting(row: Any, about: Conditions) -> _Setting:
    return _Setting(
        "cuda" if str(row.device).startswith("cuda") else str(row.device),
        row.origin is not None,
        tuple(str(about.facts.get(name)) for name in _SHARED),
    )


def _read_cells(store: Store, needs: Sequence[SweepNeed]) -> list[Any]:
    """The current cells of the models, methods and places of these grids, oldest first."""
    if not needs:
        return []
    tasks = sorted({task for need in needs for task in need.tasks})
    shapes = sorted({shape for need in needs for shape in need.scenarios})
    models = sorted({model for need in needs for model in need.models})
    methods = sorted({method for need in needs for method in need.methods})
    query = (
        select(
            cells.c.id, cells.c.status, cells.c.reason, cells.c.task, cells.c.scenario,
            variants.c.model, variants.c.method, variants.c.family, variants.c.seed, variants.c.device,
            imports.c.origin,
        )
        .select_from(
            cells.join(variants, cells.c.variant_id == variants.c.id)
            .outerjoin(imports, imports.c.sweep_id == cells.c.sweep_id)
        )
        .where(variants.c.model.in_(models))
        .where(or_(variants.c.method.in_(methods), variants.c.family == "baseline"))
        .where(
            or_(
                cells.c.task.in_(tasks),
                cells.c.scenario.in_(shapes),
                cells.c.kind == str(CellKind.TRANSFORM),
            )
        )
        .order_by(cells.c.id)
    )  # fmt: skip
    with store.reading() as connection:
        return list(connection.execute(query.where(current(connection, None))))


def _read_records(store: Store, ids: Sequence[int]) -> dict[int, dict[str, Record]]:
    """The finite records of cells by their metric, without raw readings."""
    found: dict[int, dict[str, Record]] = {}
    query = select(records)
    with store.reading() as connection:
        for chunk in chunks(ids):
            for row in connection.execute(query.where(records.c.cell_id.in_(chunk))):
                value = nan_if_null(row.value)
                if value == value:
                    found.setdefault(row.cell_id, {})[row.metric] = Record(
                        row.metric,
                        value,
                        row.unit or "",
                        row.lower,
                        row.upper,
                        row.n or 1,
                        (),
                        row.mode,
                        row.note,
                    )
    return found


def _items(store: Store, cell: int) -> tuple[Item, ...]:
    return tuple(store.items(cell))
