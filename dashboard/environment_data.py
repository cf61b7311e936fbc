"""What the Environment page shows: manifests as tables, and what tells sweeps apart.

What may stand side by side is decided in `harness.comparability`; here its facts are only told apart by
sweep and explained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from sqlalchemy import select

from harness.cli.output import format_value
from harness.comparability import Conditions, Scope, conditions_of, differences
from harness.conditions import facts_of
from harness.display import scale
from harness.measure.ceilings import UNITS
from harness.store.frames import reading
from harness.store.selection import current
from harness.store.store import Store
from harness.store.tables import cells, imports, sweeps

__all__ = [
    "MANIFEST_COLUMNS",
    "SweepFacts",
    "comparability_warnings",
    "differing",
    "manifest_table",
    "read_sweeps",
]

MANIFEST_COLUMNS = ("part", "what", "at the start", "at the end", "meaning")
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class SweepFacts:
    """What is stored about the making of one sweep; `end` is None where it did not come to its end."""

    sweep: int
    status: str
    started_at: str
    finished_at: str | None
    command: str
    config: Mapping[str, Any]
    start: Mapping[str, Any]
    end: Mapping[str, Any] | None
    origin: str | None = None

    def conditions(self) -> Conditions:
        """What `harness.comparability` compares, of the whole sweep; `cell` is the sweep's number."""
        found = facts_of(self.config, self.start, self.end)
        facts = {**found.facts, "device": self.start.get("device_name"), "limit": found.limit}
        return Conditions(self.sweep, self.sweep, facts, found.environment)


def read_sweeps(store: Store, only: Sequence[int] | None = None) -> list[SweepFacts]:
    """The sweeps of a store, or these, oldest first."""
    query = (
        select(
            sweeps.c.id, sweeps.c.status, sweeps.c.started_at, sweeps.c.finished_at, sweeps.c.command,
            sweeps.c.config, sweeps.c.manifest, sweeps.c.manifest_end, imports.c.origin,
        )
        .outerjoin(imports, imports.c.sweep_id == sweeps.c.id)
        .order_by(sweeps.c.id)
    )  # fmt: skip
    if only is not None:
        query = query.where(sweeps.c.id.in_([int(each) for each in only]))
    with reading(store) as connection:
        return [
            SweepFacts(
                row.id, row.status, row.started_at, row.finished_at, row.command, row.config or {},
                row.manifest or {}, row.manifest_end, row.origin,
            )
            for row in connection.execute(query)
        ]  # fmt: skip


# --- one manifest -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One line of the manifest: where it is, what it is called, and why a reader should care."""

    part: str
    path: str
    what: str
    meaning: str = ""
    unit: str = ""


_ENTRIES = (
    _Entry("machine", "hostname", "host name"),
    _Entry("machine", "os", "operating system"),
    _Entry("machine", "cpu", "processor", "Decides every time on the CPU, and launch times on a GPU."),
    _Entry("machine", "cpu_count", "processors"),
    _Entry("machine", "cpus_usable", "usable processors", "A container or a scheduler may grant fewer."),
    _Entry("machine", "ram_bytes", "memory", unit="B"),
    _Entry("device", "device", "device"),
    _Entry("device", "device_name", "name", "Numbers of different devices are never compared unflagged."),
    _Entry("device", "gpu.memory_bytes", "memory", unit="B"),
    _Entry("device", "gpu.driver", "driver", "Kernels are compiled and scheduled by it: matters for times."),
    _Entry("device", "cuda", "CUDA"),
    _Entry("device", "cudnn", "cuDNN"),
    _Entry("device", "gpu.ecc", "error correction (ECC)", "Costs memory bandwidth where it is on."),
    _Entry("state", "gpu.temperature_c", "temperature", "Near the limit a device slows itself down.", "°C"),
    _Entry("state", "gpu.power_w", "power drawn", "A look at one moment; idle at the start.", "W"),
    _Entry("state", "gpu.power_cap_w", "power cap", "A lower cap means lower clocks under load.", "W"),
    _Entry("state", "gpu.sm_clock_mhz", "SM clock seen", "An idle device clocks down.", "MHz"),
    _Entry("state", "gpu.sm_clock_max_mhz", "highest SM clock", unit="MHz"),
    _Entry("state", "gpu.sm_clock_set_mhz", "application SM clock", unit="MHz"),
    _Entry("state", "gpu.memory_clock_mhz", "memory clock seen", unit="MHz"),
    _Entry("state", "gpu.memory_clock_max_mhz", "highest memory clock", unit="MHz"),
    _Entry("state", "gpu.memory_clock_set_mhz", "application memory clock", unit="MHz"),
    _Entry("state", "gpu.throttle_reasons", "what held the clocks down", "At the moment of looking."),
    _Entry(
        "state", "gpu.violation_s", "time held down, by cause",
        "Counted since the driver was loaded: the difference is what happened during the sweep.", "s",
    ),
    _Entry("versions", "versions", "", "Other versions may compute, and time, differently."),
    _Entry("versions", "python", "python"),
    _Entry("versions", "measuring_version", "measuring version", "Grows when how things are measured does."),
    _Entry("code", "git.commit", "git commit", "Of the folder in which the sweep was started."),
    _Entry("code", "git.dirty", "uncommitted changes", "The commit alone does not say what ran."),
    _Entry("run", "time_utc", "time (UTC)"),
    _Entry("run", "torch_threads", "torch threads"),
    _Entry("run", "workload.threads", "threads of a worker", "Matters for times on the CPU."),
    _Entry("run", "workload.jobs", "variants at a time", "Neighbours share memory bandwidth and power."),
    _Entry("run", "workload.budget", "budget", "Of calibration and of training: decides quality."),
    _Entry("run", "environment", "", "Environment variables that change how torch computes."),
    _Entry("data", "workload.tasks", "", "Revision of the task's data: other data are other scores."),
)  # fmt: skip


def manifest_table(facts: SweepFacts) -> pd.DataFrame:
    """A sweep's manifest for people: rows of `MANIFEST_COLUMNS`, all text.

    What does not change has no value at the end. Entries that were not recorded are left out.
    """
    rows: list[tuple[str, str, str, str, str]] = []
    for entry in _ENTRIES:
        rows += _lines(entry, _at(facts.start, entry.path), _at(facts.end or {}, entry.path))
    rows += list(_config_lines(facts.config))
    rows += list(_ceiling_lines(facts.start.get("ceilings")))
    return pd.DataFrame(rows, columns=list(MANIFEST_COLUMNS), dtype=object)


def _lines(entry: _Entry, start: Any, end: Any) -> Iterator[tuple[str, str, str, str, str]]:
    if isinstance(start, Mapping):
        after = end if isinstance(end, Mapping) else {}
        for name, value in start.items():
            what = f"{entry.what}: {name}" if entry.what else str(name)
            inner = _Entry(entry.part, entry.path, what, entry.meaning, entry.unit)
            if value is not None:
                yield from _lines(inner, value, after.get(name))
        return
    if start is None and end is None:
        return
    before, later = _shown(start, entry.unit), _shown(end, entry.unit)
    changes = entry.part == "state" or (end is not None and later != before)
    yield entry.part, entry.what, before, later if changes else "", entry.meaning


_CONFIG = {
    "models": "",
    "methods": "",
    "tasks": "",
    "seeds": "Of calibration, training and random weights: the same seed gives the same scores.",
    "dtype": "The type that weights and products have without a method.",
    "batch_sizes": "",
    "prompt_lens": "",
    "new_tokens": "",
    "limit": "Only the first items of each task were asked: no evidence, a look.",
    "timeout_s": "A variant that takes longer is ended.",
    "train_steps": "",
    "calibration_samples": "",
    "calibration_len": "",
}


def _config_lines(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    for name, meaning in _CONFIG.items():
        if config.get(name) not in (None, [], {}):
            yield "asked for", name, _shown(config[name]), "", meaning


def _ceiling_lines(ceilings: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str, str, str]]:
    meaning = "The best that this very device did in a short test: what methods are held against."
    for name, value in ((ceilings or {}).get("values") or {}).items():
        unit = UNITS.get(str(name).partition("_")[0], "")
        yield "ceilings", str(name), _with_prefix(value, unit), "", meaning
    for note in (ceilings or {}).get("notes") or ():
        yield "ceilings", "note", _shown(note), "", ""


def _with_prefix(value: float, unit: str) -> str:
    if unit in ("FLOP/s", "B/s"):
        for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
            if value >= factor:
                return f"{value / factor:.4g} {prefix}{unit}"
    factor, shown = scale(unit, [value])
    return f"{value * factor:.4g} {shown}".strip()


def _at(manifest: Mapping[str, Any], path: str) -> Any:
    value: Any = manifest
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any, unit: str = "") -> str:
    if value is None:
        return ""
    if unit == "B" and isinstance(value, int | float):
        factor, shown_unit = scale("B", [float(value)])
        return f"{value * factor:.4g} {shown_unit}"
    if isinstance(value, list | tuple):
        shown = ", ".join(_shown(each) for each in value) or "nothing"
    elif isinstance(value, Mapping):
        shown = ", ".join(f"{name}={_shown(each)}" for name, each in value.items())
    else:
        # No thousands separators here: years, versions and seeds are no quantities.
        shown = format_value(value) if isinstance(value, bool | float) else str(value)
    shown = f"{shown} {unit}" if unit and shown else shown
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[: _SHOWN_CHARACTERS - 1]}…"


# --- several sweeps ---------------------------------------------------------------------------

_MEANINGS = {
    "measuring version": "How things are measured changed: never compare these.",
    "device": "Different hardware: costs say something about the device, not about the method.",
    "model files": "Other weights: another model under the same name.",
    "harness version": "The harness itself changed between them.",
    "torch version": "Kernels and their choice change with torch: times, bytes and last digits.",
    "transformers version": "The model's code and its attention may differ.",
    "triton version": "Generated kernels may be faster or slower.",
    "lm-eval version": "Prompts and scoring of tasks may differ.",
    "tokenizers version": "The same text may be other tokens.",
    "CUDA version": "Libraries of products and their choice of kernels change.",
    "cuDNN version": "Attention and convolution kernels may differ.",
    "driver": "Scheduling and clocks are the driver's.",
    "processor": "Launch overhead and every time on the CPU depend on it.",
    "CPU threads": "Times on the CPU scale with them.",
    "variants at a time": "Neighbours take bandwidth and power from each other.",
    "power cap (W)": "A lower cap means lower clocks under load.",
    "highest SM clock (MHz)": "Another grade of the same device, or other limits.",
    "highest memory clock (MHz)": "Decoding is bound by it.",
    "application SM clock (MHz)": "Clocks were fixed differently.",
    "application memory clock (MHz)": "Clocks were fixed differently.",
    "SM clock seen (MHz)": "More than 10 % apart: one of them ran slower.",
    "ECC": "Error correction costs bandwidth.",
    "throttling": "A device that is too hot or short of power slows down.",
    "limit of items": "Scores over other items: only paired comparisons of the same items hold.",
    "task data": "Other data are other scores.",
    "budget": "What calibration or training could use decides the quality of methods that need it.",
}  # fmt: skip
_ELSE = "Recorded, but nothing is judged by it."
_NOT_COMPARED = (
    "time_utc", "command", "process", "sweep_uid", "ceilings", "gpu.power_w", "gpu.temperature_c",
    "gpu.violation_s", "gpu.memory_clock_mhz", "gpu.sm_clock_mhz", "gpu.throttle_reasons",
)  # fmt: skip
_JUDGED = {
    "measuring_version", "device_name", "cpu", "cuda", "cudnn", "environment",
    "versions.transformer-harness", "versions.torch", "versions.transformers", "versions.triton",
    "versions.lm-eval", "versions.tokenizers", "gpu.driver", "gpu.ecc", "gpu.power_cap_w",
    "gpu.sm_clock_max_mhz", "gpu.memory_clock_max_mhz", "gpu.sm_clock_set_mhz",
    "gpu.memory_clock_set_mhz", "workload.threads", "workload.jobs",
}  # fmt: skip


def differing(a: SweepFacts, b: SweepFacts) -> pd.DataFrame:
    """Only what differs between two sweeps: what matters to comparisons first.

    Columns: what, the two sweeps (``sweep 1``), matters for (timing, memory, quality, or nothing), meaning.
    """
    name_a, name_b = f"sweep {a.sweep}", f"sweep {b.sweep}"
    found: dict[tuple[str, str, str], list[str]] = {}
    for scope in Scope:
        for each in differences(a.conditions(), b.conditions(), scope):
            found.setdefault((each.name, each.a, each.b), []).append(str(scope))
    rows = [
        (name, of_a, of_b, ", ".join(scopes), _MEANINGS.get(name, "Changes how torch computes."))
        for (name, of_a, of_b), scopes in found.items()
    ]
    for what, of_a, of_b, scopes, meaning in _differing_work(a, b):
        rows.append((what, of_a, of_b, scopes, meaning))
    flat_a, flat_b = dict(_flat(a.start)), dict(_flat(b.start))
    for path in sorted({*flat_a, *flat_b}):
        left, right = flat_a.get(path), flat_b.get(path)
        if left != right and path not in _JUDGED and not path.startswith(_NOT_COMPARED):
            if path.startswith(("workload.tasks.", "workload.budget", "environment.")):
                continue
            rows.append((path, _shown(left) or "none", _shown(right) or "none", "nothing", _ELSE))
    columns = ["what", name_a, name_b, "matters for", "meaning"]
    return pd.DataFrame(rows, columns=columns, dtype=object)


def _differing_work(a: SweepFacts, b: SweepFacts) -> Iterator[tuple[str, str, str, str, str]]:
    """The data of tasks that both asked, and the budgets."""
    tasks_a, tasks_b = (_at(each.start, "workload.tasks") or {} for each in (a, b))
    for task in sorted({*tasks_a} & {*tasks_b}):
        if tasks_a[task] != tasks_b[task]:
            sides = _shown(tasks_a[task]), _shown(tasks_b[task])
            yield f"task data: {task}", *sides, "quality", _MEANINGS["task data"]
    budget_a, budget_b = (_at(each.start, "workload.budget") or {} for each in (a, b))
    for part in sorted({*budget_a} & {*budget_b}):
        if budget_a[part] != budget_b[part]:
            sides = _shown(budget_a[part]), _shown(budget_b[part])
            yield f"{part} budget", *sides, "quality", _MEANINGS["budget"]


def _flat(manifest: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in manifest.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def comparability_warnings(
    store: Store, only: Sequence[int] | None = None, scopes: Iterable[Scope] = tuple(Scope)
) -> pd.DataFrame:
    """In what the sweeps that measured the current results are not alike.

    Columns: what, values (each with its sweeps), matters for, meaning. Empty where all may stand side by
    side; what differs from variant to variant by intent (type, device asked for) is not looked at here.

    Args:
        only: these sweeps instead.
        scopes: which numbers it should matter for.
    """
    if only is None:
        with reading(store) as connection:
            used = select(cells.c.sweep_id).where(current(connection, None)).distinct()
            only = [int(sweep) for sweep in connection.scalars(used)]
    rows = [each.conditions() for each in read_sweeps(store, only)]
    found: dict[tuple[str, str], list[str]] = {}
    for scope in scopes:
        for name, values in conditions_of(rows, scope):
            shown = "; ".join(f"{value} in {_numbers(sweeps_)}" for value, sweeps_ in values.items())
            found.setdefault((name, shown), []).append(str(scope))
    return pd.DataFrame(
        [
            (name, shown, ", ".join(scopes), _MEANINGS.get(name, "Changes how torch computes."))
            for (name, shown), scopes in found.items()
        ],
        columns=["what", "values", "matters for", "meaning"],
        dtype=object,
    )


def _numbers(sweep_ids: Sequence[int]) -> str:
    """``sweep 1``, ``sweeps 1, 2, 5 to 9``."""
    ordered = sorted(set(sweep_ids))
    parts: list[str] = []
    start = previous = ordered[0]
    for each in [*ordered[1:], None]:
        if each is not None and each == previous + 1:
            previous = each
            continue
        if previous - start >= 2:
            parts.append(f"{start} to {previous}")
        else:
            parts += [str(number) for number in range(start, previous + 1)]
        if each is not None:
            start = previous = each
    return f"sweep{'s' if len(ordered) > 1 else ''} {', '.join(parts)}"
