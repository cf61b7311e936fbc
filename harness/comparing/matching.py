"""Which cells of two sides belong together, and what is missing on one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.comparability import Difference, Scope, differences
from harness.comparing.cells import Cell
from harness.comparing.sides import Side
from harness.errors import ConfigError
from harness.privacy import without_identity

__all__ = ["Absent", "Group", "groups_of", "is_compared", "missing", "pairs_of"]

_COUNTS = frozenset({"outlier_column_share", "outlier_columns_beyond_capacity"})  # neither good nor bad
_NOT_COMPARED = frozenset({"control_latency", "flips", "choice_kl", "verdict"}) | _COUNTS
_DERIVED = ("_difference", "_rise", "_p", "_detectable")


@dataclass(frozen=True, slots=True)
class Absent:
    """A cell, or metrics of it, that one side has and the other lacks.

    `lacks` is ``a`` or ``b``; `metrics` are those of the side that has it; `why` is the status and reason
    of the other side's cell, or says that there is none.
    """

    lacks: str
    model: str
    method: str
    cell: str
    metrics: tuple[str, ...]
    why: str
    is_part: bool = False

    def __str__(self) -> str:
        what = f"{', '.join(self.metrics)} of {self.cell}" if self.is_part else self.cell
        return f"{self.model} {self.method} {what} ({self.why})"


@dataclass(frozen=True)
class Group:
    """The cells of both sides that ask the same; `options` says where two variants' options differ."""

    a: tuple[Cell, ...]
    b: tuple[Cell, ...]
    options: str = ""

    @property
    def ok(self) -> tuple[list[Cell], list[Cell]]:
        return [cell for cell in self.a if cell.is_ok], [cell for cell in self.b if cell.is_ok]


def groups_of(a: Side, b: Side) -> list[Group]:
    """All groups of two sides of one kind.

    Two methods meet in every model, seed and cell that both have; of one store's rows, what was imported
    meets only rows of the same origin. Two sweeps or stores meet variant by variant: the same model,
    method, options, seed and dtype. Where the label is the same and the options behind it are not (a
    default changed in between), the two meet all the same and `options` says so.

    Raises:
        ConfigError: a method on one side and a sweep or store on the other.
    """
    if a.name.is_matrix != b.name.is_matrix:
        one, other = (b, a) if a.name.is_matrix else (a, b)
        raise ConfigError(
            f"{one.text} is one variant and {other.text} a whole sweep or store: compare like with like, "
            f"such as {other.text}#{one.name.method or 'METHOD'} with {one.text}"
        )
    if not a.name.is_matrix:
        # Rows of other stores, and variants that were named one by one, meet whatever their origin.
        is_apart = a.scope == b.scope and a.name.variant is b.name.variant is None
        parts = None if is_apart else -1
        return _grouped(a.cells, b.cells, lambda cell: cell.place[:parts])
    found = _grouped(a.cells, b.cells, lambda cell: (*_variant(cell), _options(cell)))
    return _by_label(found)


def _grouped(a: Sequence[Cell], b: Sequence[Cell], key: Callable[[Cell], Hashable]) -> list[Group]:
    sides: list[dict[Hashable, list[Cell]]] = [{}, {}]
    for side, found in zip(sides, (a, b), strict=True):
        for cell in found:
            side.setdefault(key(cell), []).append(cell)
    keys = dict.fromkeys([*sides[0], *sides[1]])
    return [Group(tuple(sides[0].get(key, ())), tuple(sides[1].get(key, ()))) for key in keys]


def _by_label(found: Sequence[Group]) -> list[Group]:
    """Groups of one side only are joined where nothing but the options differs."""
    whole = [group for group in found if group.a and group.b]
    alone = [group for group in found if not (group.a and group.b)]
    left = [cell for group in alone for cell in group.a], [cell for group in alone for cell in group.b]
    joined = []
    for group in _grouped(*left, _variant):
        if group.a and group.b:
            text = _options_apart(group.a[-1].options, group.b[-1].options)
            joined.append(Group(group.a, group.b, text))
        else:
            joined.append(group)
    return [*whole, *joined]


def _variant(cell: Cell) -> tuple[Any, ...]:
    # Exported rows do not say in which folder a model was.
    return without_identity(cell.model), cell.method, cell.seed, cell.dtype, *cell.place[2:5]


def _options(cell: Cell) -> str:
    return json.dumps(cell.options, sort_keys=True, default=str)


def _options_apart(a: Any, b: Any) -> str:
    parts = []
    for first, second in zip(_steps(a), _steps(b), strict=False):
        for name in sorted({*first, *second}):
            mine, theirs = first.get(name, "not there"), second.get(name, "not there")
            if mine != theirs:
                parts.append(f"{name} {mine} and {theirs}")
    return f"options: {', '.join(parts)}" if parts else ""


def _steps(options: Any) -> list[Mapping[str, Any]]:
    return options if isinstance(options, list) else [options or {}]


def is_compared(metric: str, unit: str, is_matrix: bool) -> bool:
    """Whether a metric says something of its own on two such sides.

    A speed-up over the baseline says nothing more about two methods than their times do; of one method
    on two sides it is what a change of the machine's speed leaves alone.
    """
    name = metric.partition("/")[0].partition(",")[0]
    if unit in ("steps", "p") or name in _NOT_COMPARED or name.endswith(_DERIVED):
        return False
    return is_matrix or not name.endswith("_speedup")


def missing(groups: Sequence[Group], is_matrix: bool, metrics: Sequence[str] | None = None) -> list[Absent]:
    """What one side has, ok, and the other lacks.

    Two methods need not have been asked the same, so there only what b was asked for and has no answer to
    is missing; of two sweeps or stores, everything that is on one side only.
    """
    found: list[Absent] = []
    for group in groups:
        ok_a, ok_b = group.ok
        if ok_a and ok_b:
            found += _parts(ok_a, ok_b, is_matrix, metrics)
            found += _stale(ok_a, group.b, is_matrix, metrics)
            continue
        for has, lacks, others in ((ok_a, "b", group.b), (ok_b, "a", group.a)):
            if not has or (not is_matrix and (lacks == "a" or not others)):
                continue
            cell = has[-1]
            names = _compared_metrics(cell, is_matrix, metrics)
            if metrics is None or names:
                method = cell.method if is_matrix or not others else others[-1].method
                why = _status(others)
                found.append(Absent(lacks, cell.model, method, cell.label, tuple(names), why))
    return found


def _parts(
    ok_a: Sequence[Cell], ok_b: Sequence[Cell], is_matrix: bool, metrics: Sequence[str] | None
) -> Iterator[Absent]:
    """Metrics that a has and b, where it is ok, has not; of two methods only what is no number in b."""
    cell = ok_b[-1]
    there = {name for each in ok_b for name in each.records}
    broken = {name for each in ok_b for name in each.broken} - there
    of_a = {name: each.units[name] for each in ok_a for name in each.records}
    names = [
        name
        for name, unit in of_a.items()
        if name not in there and (is_matrix or name in broken) and is_compared(name, unit, is_matrix)
    ]
    names = [name for name in names if metrics is None or name in metrics]
    if names:
        why = "no number" if set(names) <= broken else "not measured"
        yield Absent("b", cell.model, cell.method, cell.label, tuple(names), why, is_part=True)


def _stale(
    ok_a: Sequence[Cell], of_b: Sequence[Cell], is_matrix: bool, metrics: Sequence[str] | None
) -> Iterator[Absent]:
    """Where b's newest attempt has no answer, an older one must not stand in for it."""
    newest = {(cell.dtype, cell.device): cell for cell in sorted(of_b, key=lambda cell: cell.id)}
    for (dtype, _), cell in newest.items():
        mine = [each for each in ok_a if each.dtype == dtype]
        names = _compared_metrics(mine[-1], is_matrix, metrics) if mine else []
        if names and not cell.is_ok:
            why = f"measured before, but the newest is {_status([cell])}"
            yield Absent("b", cell.model, cell.method, cell.label, tuple(names), why)


def _compared_metrics(cell: Cell, is_matrix: bool, metrics: Sequence[str] | None) -> list[str]:
    names = [name for name in cell.records if is_compared(name, cell.units[name], is_matrix)]
    return [name for name in names if metrics is None or name in metrics]


def _status(others: Sequence[Cell]) -> str:
    return others[-1].told if others else "not there"


def pairs_of(
    mine: Sequence[Cell], theirs: Sequence[Cell], scope: Scope, metric: str
) -> Iterator[tuple[Cell, Cell, tuple[Difference, ...], str | None]]:
    """For one group the pairs to compare: the newest comparable one of each device and type.

    Where no pair of a device and type is comparable, the newest with what keeps it from being compared; where
    both sides share none, the newest of all. The text says where a newer measurement of b was passed over.
    """
    judged = []
    for b in sorted(theirs, key=lambda cell: -cell.id):
        for a in sorted(mine, key=lambda cell: -cell.id):
            modes = a.records[metric].mode, b.records[metric].mode
            judged.append((a, b, differences(a.conditions, b.conditions, scope, modes)))
    comparable = [each for each in judged if not each[2]]
    if not comparable:
        yield (*judged[0], None)
        return
    # All items of a task are better evidence than the first few, whichever is newer.
    comparable.sort(key=lambda each: each[1].conditions.limit or math.inf, reverse=True)
    has_partner = {b.id for _, b, _ in comparable}
    done = set()
    for a, b, none in comparable:
        setting = b.dtype, b.device
        if setting in done:
            continue
        done.add(setting)
        newer = [
            x.sweep for x in theirs
            if x.id > b.id and (x.dtype, x.device) == setting and x.id not in has_partner
        ]  # fmt: skip
        passed = f"sweep {max(newer)} measured b under other conditions" if newer else None
        yield a, b, none, passed
    for a, b, found in judged:
        setting = b.dtype, b.device
        if setting not in done and (a.dtype, a.device) == setting:
            done.add(setting)
            yield a, b, found, None
