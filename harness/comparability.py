"""Which rows may stand side by side: under what each cell was measured, and where two cells differ.

The facts come from what is stored: the manifest of the sweep that measured a cell (at its start and its
end), its configuration, and the variant. A fact that was not recorded (an older store, a machine that
does not tell) is None and differs from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import select

from harness.keys import content_key
from harness.records import CellKind
from harness.store.tables import cells, records, sweeps, variants

if TYPE_CHECKING:
    from harness.planning import SweepPlan
    from harness.store.store import Store

__all__ = [
    "Conditions",
    "Difference",
    "Scope",
    "base_mode",
    "conditions_of",
    "differences",
    "facts_of",
    "read_conditions",
    "scope_of",
    "workload",
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
}

_PASSING = frozenset({"SM clock seen (MHz)", "throttling"})
_KNOWN_ABSENT = frozenset({"limit"})  # None is a value here, not something unknown
_SLOWDOWNS = ("HwSlowdown", "HwThermalSlowdown", "SwThermalSlowdown", "HwPowerBrakeSlowdown")
_VIOLATIONS = ("thermal",)  # a cap of power or voltage holds clocks down in normal operation too
_SHOWN_CHARACTERS = 60  # hashes and revisions are shortened
_CHUNK = 10_000
_VIOLATION_SHARE = 0.01  # of the sweep's time; less is a moment that no median notices


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


def workload(plan: SweepPlan) -> dict[str, Any]:
    """What a sweep's manifest says beside the machine: threads, tasks' data, budgets."""
    from harness.planning import threads_per_worker

    tasks = {cell.task.name: cell.task.revision for cell in plan.grid.cells if cell.task is not None}
    return {
        "threads": threads_per_worker(plan.config.jobs),
        "jobs": plan.config.jobs,
        "tasks": tasks,
        "budget": plan.budget.identity(),
    }


# --- from the store -----------------------------------------------------------------------------------


def read_conditions(store: Store, cell_ids: Iterable[int]) -> dict[int, Conditions]:
    """The conditions of cells, by their ids."""
    wanted = sorted({int(cell) for cell in cell_ids})
    query = select(
        cells.c.id, cells.c.sweep_id, cells.c.kind, cells.c.task, cells.c.variant_id,
        variants.c.model_identity, variants.c.dtype, variants.c.device, variants.c.device_name,
        variants.c.simulated, variants.c.synthetic,
    ).join(variants, cells.c.variant_id == variants.c.id)  # fmt: skip
    budgets = (
        select(cells.c.variant_id, records.c.metric)
        .join(records, records.c.cell_id == cells.c.id)
        .where(records.c.metric.in_(["calibration_tokens", "trained_tokens"]), records.c.value > 0)
    )
    with store.reading() as connection:
        rows = [
            row
            for first in range(0, len(wanted), _CHUNK)
            for row in connection.execute(query.where(cells.c.id.in_(wanted[first : first + _CHUNK])))
        ]
        sweep_ids = sorted({row.sweep_id for row in rows})
        columns = (sweeps.c.id, sweeps.c.config, sweeps.c.manifest, sweeps.c.manifest_end)
        found = connection.execute(select(*columns).where(sweeps.c.id.in_(sweep_ids)))
        about = {row.id: facts_of(row.config or {}, row.manifest or {}, row.manifest_end) for row in found}
        about_variants = sorted({row.variant_id for row in rows})
        spent = {
            (variant, metric)
            for first in range(0, len(about_variants), _CHUNK)
            for variant, metric in connection.execute(
                budgets.where(cells.c.variant_id.in_(about_variants[first : first + _CHUNK]))
            )
        }
    return {row.id: _cell_conditions(row, about[row.sweep_id], spent) for row in rows}


@dataclass(frozen=True)
class _SweepFacts:
    """What holds for every cell that a sweep measured."""

    facts: Mapping[str, Any]
    environment: Mapping[str, str] | None
    limit: int | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)


def facts_of(
    config: Mapping[str, Any], manifest: Mapping[str, Any], end: Mapping[str, Any] | None
) -> _SweepFacts:
    """The facts that a sweep's manifests and its configuration hold; pure."""
    versions = manifest.get("versions") or {}
    gpu = manifest.get("gpu") or {}
    gpu_end = (end or {}).get("gpu") or {}
    work = manifest.get("workload") or {}
    clocks = [clock for clock in (gpu.get("sm_clock_mhz"), gpu_end.get("sm_clock_mhz")) if clock]
    on_cpu = str(manifest.get("device", "")) == "cpu"
    facts = {
        "measuring": manifest.get("measuring_version"),
        "harness": versions.get("transformer-harness"),
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
        "triton": None if on_cpu else versions.get("triton"),
        "lm_eval": versions.get("lm-eval"),
        "tokenizers": versions.get("tokenizers"),
        "cuda": None if on_cpu else manifest.get("cuda"),
        "cudnn": manifest.get("cudnn"),
        "driver": gpu.get("driver"),
        "cpu": manifest.get("cpu"),
        "threads": work.get("threads") if on_cpu else None,
        "jobs": work.get("jobs"),
        "power_cap_w": _rounded(gpu.get("power_cap_w")),
        "sm_clock_max_mhz": gpu.get("sm_clock_max_mhz"),
        "memory_clock_max_mhz": gpu.get("memory_clock_max_mhz"),
        "sm_clock_set_mhz": gpu.get("sm_clock_set_mhz"),
        "memory_clock_set_mhz": gpu.get("memory_clock_set_mhz"),
        # An idle device clocks down, so of the two looks the faster one says what it runs at.
        "sm_clock_seen_mhz": max(clocks, default=None),
        "ecc": gpu.get("ecc"),
        "throttled": _throttling(manifest, end) if gpu else None,
    }
    return _SweepFacts(
        facts=facts,
        environment=manifest.get("environment"),
        limit=config.get("limit"),
        tasks=work.get("tasks") or {},
        budget=work.get("budget") or {},
    )


def _cell_conditions(row: Any, sweep: _SweepFacts, spent: set[tuple[int, str]]) -> Conditions:
    is_task = row.kind == CellKind.TASK
    used = {
        "calibration": (row.variant_id, "calibration_tokens") in spent,
        "training": (row.variant_id, "trained_tokens") in spent,
    }
    facts = {
        **sweep.facts,
        # What lm-eval's files do not say of an imported row is empty, or unknown.
        "device": row.device_name or None,
        "dtype": None if row.dtype == "unknown" else row.dtype,
        "model": row.model_identity or None,
        "limit": sweep.limit if is_task else None,
        "task": sweep.tasks.get(row.task) if is_task else None,
        **{name: _budget(sweep.budget.get(name)) if used[name] else None for name in used},
    }
    return Conditions(
        cell=row.id,
        sweep=row.sweep_id,
        facts=facts,
        environment=sweep.environment,
        simulated=row.simulated is True,
        synthetic=row.synthetic,
    )


def _budget(spent: Mapping[str, Any] | None) -> str | None:
    if spent is None:
        return None
    shown = {name: value[:8] if name == "text" else value for name, value in spent.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _throttling(manifest: Mapping[str, Any], end: Mapping[str, Any] | None) -> str:
    """``none``, or what slowed the device down: seen at the start or the end, or counted between them."""
    start_gpu, end_gpu = manifest.get("gpu") or {}, (end or {}).get("gpu") or {}
    seen = {
        reason
        for gpu in (start_gpu, end_gpu)
        for reason in gpu.get("throttle_reasons") or ()
        if reason in _SLOWDOWNS
    }
    elapsed_s = _elapsed_s(manifest.get("time_utc"), (end or {}).get("time_utc"))
    before, after = start_gpu.get("violation_s") or {}, end_gpu.get("violation_s") or {}
    for name in _VIOLATIONS:
        if elapsed_s and before.get(name) is not None and after.get(name) is not None:
            share = (after[name] - before[name]) / elapsed_s
            if share > _VIOLATION_SHARE:
                seen.add(f"{name} violations")
    return ", ".join(sorted(seen)) or "none"


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _elapsed_s(start: str | None, end: str | None) -> float | None:
    """Seconds between two times of manifests; None where one is missing or, in a foreign file, no time."""
    if start is None or end is None:
        return None
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (TypeError, ValueError):
        return None


def _scopes_of_variable(name: str) -> frozenset[Scope]:
    if name.endswith("_NUM_THREADS") or name.startswith(("OMP_", "KMP_")):
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
