"""Everything that a store knows about why a variant is as fast, as large and as costly as it is.

One `Explanation` for each variant and shape: what ran and for how long, achieved against possible, memory
in parts, what the transform did and cost, and the verdict against the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import ConfigError, UnknownName
from harness.records import KernelUse
from harness.store import queries

if TYPE_CHECKING:
    from harness.store.store import Store

__all__ = ["ACHIEVED", "MEMORY_PARTS", "PHASES", "Explanation", "explanations"]

PHASES = ("load", "transform", "prefill", "decode")
MEMORY_PARTS = ("weight", "kv_cache", "activation", "workspace", "peak", "host_peak")
ACHIEVED = (
    ("prefill", "prefill_latency", "prefill_speedup", "prefill_flops_per_s", "prefill_mfu"),
    ("decode", "decode_latency", "decode_speedup", "decode_flops_per_s", "decode_mfu"),
    ("decode", "decode_latency", "decode_speedup", "decode_bytes_per_s", "decode_mbu"),
)
"""(phase, time, speed-up, achieved, share of the ceiling), by the names of the records."""

_EFFECT = (
    "parameters_changed_share",
    "stored_bits_per_weight",
    "sparsity",
    "compression_ratio",
    "theoretical_compression_ratio",
)
_COST = (
    "transform_s",
    "transform_energy",
    "calibration_tokens",
    "trained_tokens",
    "transform_read_bytes",
    "transform_written_bytes",
)


@dataclass(frozen=True)
class Explanation:
    """One variant in one shape. `records` are those of its scenario cell and of its transform, by metric;
    each is a dict of `value`, `unit`, `lower`, `upper`, `n`, `mode` and `note`. `device` is its name."""

    model: str
    method: str
    seed: int
    scenario: str
    synthetic: bool
    simulated: bool | None
    records: Mapping[str, Mapping[str, Any]]
    kernels: tuple[KernelUse, ...]
    dtype: str = ""
    device: str = ""

    def value(self, metric: str) -> float | None:
        record = self.records.get(metric)
        return None if record is None else record["value"]

    @property
    def verdict(self) -> str | None:
        """In words; None for a baseline, and where the baseline was not measured."""
        record = self.records.get("verdict")
        return None if record is None else record["note"]

    def memory(self) -> list[dict[str, Any]]:
        """A row a phase with the bytes of each part; None where it was not measured."""
        rows: list[dict[str, Any]] = []
        for phase in PHASES:
            parts = {part: self.value(f"{phase}_{part}_bytes") for part in MEMORY_PARTS}
            if any(size is not None for size in parts.values()):
                rows.append({"phase": phase, **parts})
        return rows

    def as_json(self) -> dict[str, Any]:
        """The stable form of ``--format json``."""
        return {
            "model": self.model,
            "method": self.method,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": self.device,
            "scenario": self.scenario,
            "synthetic": self.synthetic,
            "simulated": self.simulated,
            "verdict": self.verdict,
            "effect": {name: self.value(name) for name in _EFFECT},
            "cost": {name: self.value(name) for name in _COST},
            "achieved": [
                {
                    "phase": phase,
                    "latency_s": self.value(time),
                    "speedup": self.value(speedup),
                    "achieved": self.value(achieved),
                    "unit": self.records.get(achieved, {}).get("unit"),
                    "share_of_ceiling": self.value(share),
                    "mode": self.records.get(time, {}).get("mode"),
                    "note": self.records.get(share, self.records.get(achieved, {})).get("note"),
                }
                for phase, time, speedup, achieved, share in ACHIEVED
                if self.value(time) is not None
            ],
            "energy_j_per_token": {phase: self.value(f"{phase}_energy") for phase in ("prefill", "decode")},
            "memory": self.memory(),
            "kernels": [
                {
                    "phase": kernel.phase,
                    "name": kernel.name,
                    "family": kernel.family,
                    "calls": kernel.calls,
                    "seconds": kernel.seconds,
                    "share": kernel.share,
                }
                for kernel in self.kernels
            ],
        }


def explanations(
    store: Store,
    methods: Iterable[str] | None = None,
    *,
    models: Iterable[str] | None = None,
    scenarios: Iterable[str] | None = None,
    sweep: int | Literal["last"] | None = None,
) -> list[Explanation]:
    """One for each ok scenario cell, in the order of the results.

    Args:
        methods: as `harness.store.queries.results` takes them; None means all.

    Raises:
        UnknownName: a method or a model of which the store has no rows.
        ConfigError: nothing was timed, or nothing of these methods was measured.
    """
    wanted = None if methods is None else list(methods)
    models = None if models is None else list(models)
    frame = queries.results(store, sweep=sweep, models=models, methods=wanted, statuses=["ok"])
    if lacking := [name for name in models or () if name not in set(frame["model"])]:
        known = sorted(set(queries.results(store, sweep=sweep)["model"]))
        if unknown := [name for name in lacking if name not in known]:
            raise UnknownName("model in this store:", unknown[0], known)
    labels = set(frame["method"])
    # As the query takes them: a name alone also means every setting of it.
    labels |= {label.partition(":")[0] for label in labels if "+" not in label}
    for name in wanted or ():
        if name in labels:
            continue
        tried = queries.results(store, sweep=sweep, models=models, methods=[name])
        if tried.empty:
            known = sorted(set(queries.results(store, sweep=sweep, models=models)["method"]))
            raise UnknownName("method in this store:", name, known)
        last = tried.iloc[-1]
        raise ConfigError(f"nothing of {last['method']} was measured: {last['status']}: {last['reason']}")
    timed = frame[frame["kind"] == "scenario"]
    if scenarios is not None:
        timed = timed[timed["scenario"].isin(list(scenarios))]
    if timed.empty:
        raise ConfigError("nothing was timed there, so there is nothing to explain; run: harness sweep")
    of_variants = {
        int(rows.iloc[0]["variant"]): _records(rows)
        for _, rows in frame[frame["kind"] == "transform"].groupby("variant", sort=False)
    }
    found = []
    for _, rows in timed.groupby("cell", sort=False):
        first = rows.iloc[0]
        found.append(
            Explanation(
                model=first["model"],
                method=first["method"],
                seed=int(first["seed"]),
                scenario=first["scenario"],
                synthetic=bool(first["synthetic"]),
                simulated=None if first["simulated"] is None else bool(first["simulated"]),
                records=of_variants.get(int(first["variant"]), {}) | _records(rows),
                kernels=store.kernels(int(first["cell"])),
                dtype=first["dtype"],
                device=first["device_name"],
            )
        )
    return found


def _records(rows: Any) -> dict[str, dict[str, Any]]:
    columns = ("value", "unit", "lower", "upper", "n", "mode", "note")
    return {
        row["metric"]: {name: _known(row[name]) for name in columns}
        for row in rows.to_dict("records")
        if row["metric"] is not None
    }


def _known(value: Any) -> Any:
    """None for what is missing or not a number."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if value is not None and str(value) == "<NA>" else value
