"""What a verdict rests on: the records and kernels of two cells, and what the transform did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.display import in_times
from harness.records import KernelUse, ModuleEffect, Record

__all__ = ["CellFacts", "Ratio", "VariantFacts", "time_ratio"]


@dataclass(frozen=True, slots=True)
class CellFacts:
    """A scenario cell: its records by metric and its kernels."""

    records: Mapping[str, Record]
    kernels: tuple[KernelUse, ...] = ()

    def value(self, metric: str) -> float | None:
        record = self.records.get(metric)
        return None if record is None or record.value != record.value else record.value

    def of(self, phase: str) -> list[KernelUse]:
        return [kernel for kernel in self.kernels if kernel.phase == phase]


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """What the transform did: the modules' effects and the records of the transform cell.

    `dtype` is the model's type, `batch` the shape's label for the sentences.
    """

    effects: tuple[ModuleEffect, ...] = ()
    records: Mapping[str, Record] | None = None
    simulated: bool = False
    dtype: str = ""
    shape: str = ""

    def value(self, metric: str) -> float | None:
        record = (self.records or {}).get(metric)
        return None if record is None else record.value

    @property
    def changed(self) -> list[ModuleEffect]:
        return [effect for effect in self.effects if effect.changed]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Variant over baseline, above 1 is more; with its 95 % interval where there is one."""

    value: float
    lower: float | None = None
    upper: float | None = None

    @property
    def is_more(self) -> bool:
        return (self.value if self.lower is None else self.lower) > 1.0

    def __str__(self) -> str:
        if self.lower is None or self.upper is None:
            return f"{in_times(self.value)}×"
        return f"{in_times(self.value)}× [{in_times(self.lower)}, {in_times(self.upper)}]"


def time_ratio(phase: str, variant: CellFacts, baseline: CellFacts) -> Ratio | None:
    """The time of a phase over the baseline's.

    From the paired ``*_speedup`` where there is one; else from the two latencies, whose intervals are
    combined as if each were at its worst, which is cautious.
    """
    paired = variant.records.get(f"{phase}_speedup")
    if paired is not None and paired.value > 0:
        lower = 1 / paired.upper if paired.upper else None
        upper = 1 / paired.lower if paired.lower else None
        return Ratio(1 / paired.value, lower, upper)
    ours, theirs = (facts.records.get(f"{phase}_latency") for facts in (variant, baseline))
    if ours is None or theirs is None or not theirs.value > 0:
        return None
    ratio = ours.value / theirs.value
    if ours.lower and ours.upper and theirs.lower and theirs.upper:
        return Ratio(ratio, ours.lower / theirs.upper, ours.upper / theirs.lower)
    return Ratio(ratio)
