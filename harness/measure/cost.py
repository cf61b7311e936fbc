"""What loading and transforming a model cost: time, memory, energy, bytes read and written.

======================================  ============  ===============================================
record (``load_…``, ``transform_…``)    unit          what it is
======================================  ============  ===============================================
``transform_s``                         s             wall-clock time, training included
``transform_peak_bytes``                B             peak of the device's memory (`PeakMemory`)
``transform_weight_bytes`` …            B             the same in parts (`memory_split`)
``transform_host_peak_bytes``           B             resident memory of the process at its highest
``transform_energy``                    J             of the device, where it has a counter
``transform_read_bytes``, ``…written…`` B             by read and write calls (Linux)
======================================  ============  ===============================================
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from harness.measure.energy import EnergyCounter, energy_counter
from harness.measure.memory import PeakMemory
from harness.measure.memory_split import bytes_on, split_of, split_records, weight_tensors
from harness.records import Record

__all__ = ["PhaseCost"]

_IO = Path("/proc/self/io")


@dataclass(frozen=True, slots=True)
class _Transferred:
    read_bytes: int
    written_bytes: int


class PhaseCost:
    """What a block of code cost: ``with PhaseCost(device, model) as cost: ...``, then `records`.

    Args:
        model: what is on the device when the block begins; None before anything is loaded.
    """

    def __init__(self, device: torch.device, model: nn.Module | None = None) -> None:
        self.device = device
        self.memory = PeakMemory(device)
        self.seconds = 0.0
        self.joules: float | None = None
        self.transferred: _Transferred | None = None
        self._weights_before = 0 if model is None else bytes_on(weight_tensors(model), device)
        self._counter: EnergyCounter | None = None

    def __enter__(self) -> Self:
        self._counter = _open_counter(self.device)
        self.memory.__enter__()
        self._joules_before = _read(self._counter)
        self._transferred_before = _transferred()
        self._started_at = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda" and error is None:
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._started_at
        now = _transferred()
        if now is not None and self._transferred_before is not None:
            before = self._transferred_before
            self.transferred = _Transferred(
                now.read_bytes - before.read_bytes, now.written_bytes - before.written_bytes
            )
        joules = _read(self._counter)
        if joules is not None and self._joules_before is not None:
            self.joules = joules - self._joules_before
        if self._counter is not None:
            self._counter.__exit__(kind, error, trace)
        if error is None or self.device.type != "cuda":  # after a CUDA error every further call fails
            self.memory.__exit__(kind, error, trace)

    def records(self, phase: str, model: nn.Module) -> list[Record]:
        """The cost in records.

        Args:
            phase: ``load`` or ``transform``.
            model: what is there when the block has ended.
        """
        weights = bytes_on(weight_tensors(model), self.device)
        lasting = max(0, self.memory.start_bytes - self._weights_before)
        split = split_of(self.memory, weights, 0, lasting)
        peak = self.memory
        records = [
            Record(f"{phase}_s", self.seconds, "s"),
            Record(f"{phase}_peak_bytes", peak.peak_bytes, "B", mode=peak.mode, note=peak.note),
            *split_records(phase, split, peak),
        ]
        if self.joules is not None and self._counter is not None:
            note = "all that the device drew while it lasted"
            records.append(Record(f"{phase}_energy", self.joules, "J", mode=self._counter.source, note=note))
        if self.transferred is not None:
            note = "by system calls; files that are mapped into memory are not counted"
            records.append(Record(f"{phase}_read_bytes", self.transferred.read_bytes, "B", note=note))
            records.append(Record(f"{phase}_written_bytes", self.transferred.written_bytes, "B", note=note))
        return records


def _open_counter(device: torch.device) -> EnergyCounter | None:
    try:
        return energy_counter(device).__enter__()
    except OSError:  # `harness doctor` says why
        return None


def _read(counter: EnergyCounter | None) -> float | None:
    try:
        return None if counter is None else counter.read_j()
    except OSError:
        return None


def _transferred() -> _Transferred | None:
    try:
        lines = _IO.read_text().splitlines()
    except OSError:
        return None
    counts = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return _Transferred(counts["rchar"], counts["wchar"])
