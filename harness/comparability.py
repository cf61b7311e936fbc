"""Which rows may stand side by side: which conditions matter to which numbers, and where two cells differ.

`harness.conditions` reads the facts from what is stored. A fact that was not recorded (an older store, a
machine that does not tell) is None and differs from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from harness.keys import content_key
from harness.records import CellKind

__all__ = [
    "Conditions",
    "Difference",
    "Scope",
    "base_mode",
    "conditions_of",
    "differences",
    "scope_of",
]


class Scope(StrEnum):
    """What kind of number is compared: not every condition matters to each."""

    TIMING = "timing"
    MEMORY = "memory"
    QUALITY = "quality"


_ALL = frozenset(Scope)
_TIMING = frozenset({Scope.TIMING})
_COST = frozenset({Scope.TIMING, Scope.MEMORY})
_QUALITY = frozenset({Scope.QUALITY})


class _Fact(NamedTuple):
    label: str
    scopes: frozenset[Scope]
    tolerance: float = 0.0  # relative, of numbers


_FACTS: Mapping[str, _Fact] = {
    "measuring": _Fact("measuring version", _ALL),
    "device": _Fact("device", _ALL),
    "dtype": _Fact("dtype", _ALL),
    "model": _Fact("model files", _ALL),
    "harness": _Fact("harness version", _ALL),
    "torch": _Fact("torch version", _ALL),
    "transformers": _Fact("transformers version", _ALL),
    "triton": _Fact("triton version", _COST),
    "lm_eval": _Fact("lm-eval version", _QUALITY),
    "tokenizers": _Fact("tokenizers version", _QUALITY),
    "cuda": _Fact("CUDA version", _COST),
    "cudnn": _Fact("cuDNN version", _COST),
    "driver": _Fact("driver", _TIMING),
    "cpu": _Fact("processor", _TIMING),
    "threads": _Fact("CPU threads", _TIMING),
    "jobs": _Fact("variants at a time", _TIMING),
    "power_cap_w": _Fact("power cap (W)", _TIMING),
    "sm_clock_max_mhz": _Fact("highest SM clock (MHz)", _TIMING),
    "memory_clock_max_mhz": _Fact("highest memory clock (MHz)", _TIMING),
    "sm_clock_set_mhz": _Fact("application SM clock (MHz)", _TIMING),
    "memory_clock_set_mhz": _Fact("application memory clock (MHz)", _TIMING),
    "sm_clock_seen_mhz": _Fact("SM clock seen (MHz)", _TIMING, 0.10),
    "ecc": _Fact("ECC", _TIMING),
    "throttled": _Fact("throttling", _TIMING),
    "task": _Fact("task data", _QUALITY),
    "limit": _Fact("limit of items", _QUALITY),
    "calibration": _Fact("calibration budget", _QUALITY),
    "training": _Fact("training budget", _QUALITY),
    # What making a variant took depends on them too; what it takes to run does not.
    "transform_calibration": _Fact("calibration budget", _COST),
    "transform_training": _Fact("training budget", _COST),
}

_PASSING = frozenset({"SM clock seen (MHz)", "throttling"})
_KNOWN_ABSENT = frozenset({"limit"})  # None is a value here, not something unknown
_SHOWN_CHARACTERS = 60  # hashes and revisions are shortened


@dataclass(frozen=True)
class Conditions:
    """Under what one cell was measured.

    `facts` are named as in `_FACTS`; `environment` holds the variables that change how torch and its
    libraries run, None where they were not recorded.
    """

    cell: int
    sweep: int
    facts: Mapping[str, Any]
    environment: Mapping[str, str] | None = None
    simulated: bool = False
    synthetic: bool = False

    @property
    def limit(self) -> int | None:
        limit = self.facts.get("limit")
        return None if limit is None else int(limit)

    def variables(self, scope: Scope) -> dict[str, str]:
        """The environment variables that matter to this kind of number."""
        return {
            name: value
            for name, value in (self.environment or {}).items()
            if scope in _scopes_of_variable(name)
        }

    def fingerprint(self, scope: Scope) -> str:
        """Equal for cells of one scope that nothing tells apart (eight hexadecimal digits).

        Facts that are only compared with a tolerance are left out.
        """
        facts = {
            name: self.facts.get(name)
            for name, fact in _FACTS.items()
            if scope in fact.scopes and not fact.tolerance
        }
        shown = {"facts": facts, "environment": self.variables(scope), "scope": str(scope)}
        return content_key(shown)[:8]


@dataclass(frozen=True, slots=True)
class Difference:
    """One condition in which two cells differ, ready to be read."""

    name: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.name}: {self.a} and {self.b}"

    @property
    def is_passing(self) -> bool:
        """A state of the moment, which rounds in one process share: it leaves their ratio alone."""
        return self.name in _PASSING


def scope_of(kind: str, unit: str, metric: str = "") -> Scope:
    """What a record is about, by the kind of its cell, its unit, and its name where it has no unit.

    >>> scope_of("scenario", "tokens/s"), scope_of("scenario", "B"), scope_of("task", "fraction")
    (<Scope.TIMING: 'timing'>, <Scope.MEMORY: 'memory'>, <Scope.QUALITY: 'quality'>)
    """
    if kind == CellKind.TASK:
        return Scope.QUALITY
    if metric.endswith(("_mbu", "_mfu")):  # shares of the device's peaks
        return Scope.TIMING
    if metric.endswith("compression_ratio"):  # of bytes, where other ratios are of times
        return Scope.MEMORY
    numerator, _, denominator = unit.partition("/")
    if numerator in ("s", "ms", "us", "W", "J", "x") or denominator == "s":
        return Scope.TIMING
    return Scope.MEMORY


def base_mode(mode: str | None) -> str | None:
    """How a reading was taken, without what was taken.

    >>> base_mode("graph, paired, simulated")
    'graph'
    """
    return None if mode is None else mode.partition(",")[0].strip()


def differences(
    a: Conditions, b: Conditions, scope: Scope, modes: tuple[str | None, str | None] = (None, None)
) -> tuple[Difference, ...]:
    """Everything that keeps two cells' numbers of one kind from being compared; empty where nothing does.

    Args:
        modes: how the two records were taken, such as ``graph`` and ``eager``.
    """
    found = [
        Difference(fact.label, _shown(a.facts.get(name)), _shown(b.facts.get(name)))
        for name, fact in _FACTS.items()
        if scope in fact.scopes and _differ(name, a.facts.get(name), b.facts.get(name), fact.tolerance)
    ]
    if a.environment is not None and b.environment is not None:
        of_a, of_b = a.variables(scope), b.variables(scope)
        found += [
            Difference(name, of_a.get(name, "unset"), of_b.get(name, "unset"))
            for name in sorted({*of_a, *of_b})
            if of_a.get(name) != of_b.get(name)
        ]
    taken = base_mode(modes[0]), base_mode(modes[1])
    if None not in taken and taken[0] != taken[1]:
        found.append(Difference("mode", str(taken[0]), str(taken[1])))
    return tuple(found)


def conditions_of(rows: Iterable[Conditions], scope: Scope) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """The conditions of one scope in which these cells are not all alike.

    Yields a label with the cells of each value, so that a table can say which row stands apart.
    """
    rows = list(rows)
    for name, fact in _FACTS.items():
        if scope not in fact.scopes:
            continue
        values: list[tuple[Any, list[int]]] = []
        for row in rows:
            value = row.facts.get(name)
            if value is None and name not in _KNOWN_ABSENT:
                continue
            known = next((c for v, c in values if not _differ(name, v, value, fact.tolerance)), None)
            if known is None:
                values.append((value, [row.cell]))
            else:
                known.append(row.cell)
        if len(values) > 1:
            yield fact.label, {_shown(value): found for value, found in values}
    recorded = [(row, row.variables(scope)) for row in rows if row.environment is not None]
    for variable in sorted({name for _, variables in recorded for name in variables}):
        by_value: dict[str, list[int]] = {}
        for row, variables in recorded:
            by_value.setdefault(variables.get(variable, "unset"), []).append(row.cell)
        if len(by_value) > 1:
            yield variable, by_value


def _scopes_of_variable(name: str) -> frozenset[Scope]:
    if name.endswith("_NUM_THREADS") or name.startswith(("OMP_", "GOMP_", "KMP_")):
        return _TIMING
    return _COST if "ALLOC" in name else _ALL


def _differ(name: str, a: Any, b: Any, tolerance: float) -> bool:
    if (a is None or b is None) and name not in _KNOWN_ABSENT:
        return False
    if tolerance and all(isinstance(value, (int, float)) for value in (a, b)):
        return bool(abs(a - b) > tolerance * max(abs(a), abs(b)))
    return bool(a != b)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:8]}…{text[-8:]}"
