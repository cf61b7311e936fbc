"""Energy of a call, from the counter that the hardware keeps.

NVML counts the millijoules of a GPU since its driver was loaded and RAPL the microjoules of a processor's
packages; a difference of two readings is the energy between them, everything that the device did included.
NVML moves its counter only every 20 to 100 ms. A window therefore begins and ends at the moment when the
counter moves, with the calls running all the while: the counter's step costs no accuracy then, only the
length of the last few calls does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

__all__ = [
    "CPU_ENERGY",
    "CUDA_ENERGY",
    "EnergyBudget",
    "EnergyCounter",
    "EnergyReading",
    "NvmlCounter",
    "RaplCounter",
    "energy_counter",
    "energy_problem",
    "measure_energy",
]

RAPL = Path("/sys/class/powercap")
_POLL_S = 0.002  # between two looks at an idle counter
_MOST_TICK_S = 0.5  # a counter that stands still for so long is broken
_PATIENCE = 3  # windows of slow calls are long; after this many times the budget, one is enough


@dataclass(frozen=True, slots=True)
class EnergyBudget:
    """`windows` windows of at least `window_s`, after `idle_s` of rest to learn the idle power (0: none)."""

    windows: int
    window_s: float
    idle_s: float


CUDA_ENERGY = EnergyBudget(windows=3, window_s=0.35, idle_s=0.2)
CPU_ENERGY = EnergyBudget(windows=3, window_s=0.1, idle_s=0.05)


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """Joules of one call, a reading a window; `calls` of all windows together.

    `idle_w` is what the device draws while nothing runs; it is part of the joules. `problem` says why
    there are no readings; `source` is empty where the device has no counter at all.
    """

    joules: tuple[float, ...] = ()
    calls: int = 0
    idle_w: float | None = None
    source: str = ""
    problem: str | None = None


class EnergyCounter(Protocol):
    """Counts joules from some moment on; a context manager."""

    source: str

    def read_j(self) -> float:
        """Raises OSError where the counter cannot be read any more."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class NvmlCounter:
    """The total-energy counter of a GPU (Volta and later)."""

    source = "nvml"

    def __init__(self, device: torch.device, nvml: Any | None = None, uuid: str | None = None) -> None:
        if nvml is None:
            import pynvml

            nvml = pynvml
        self._nvml: Any = nvml
        self._uuid = uuid or str(torch.cuda.get_device_properties(device).uuid)
        self._handle: Any = None

    def __enter__(self) -> Self:
        with self._translated():
            self._nvml.nvmlInit()
            # CUDA_VISIBLE_DEVICES renumbers the devices of CUDA but not those of NVML.
            name = self._uuid if self._uuid.startswith(("GPU-", "MIG-")) else f"GPU-{self._uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(name)
        return self

    def __exit__(self, *_: object) -> None:
        with self._translated():
            self._nvml.nvmlShutdown()

    def read_j(self) -> float:
        with self._translated():
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error


class RaplCounter:
    """The energy of all processor packages, wrapped counters unwrapped."""

    source = "rapl"

    def __init__(self, root: Path = RAPL) -> None:
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it; AMD uses the same names.
        zones = sorted(zone for zone in root.glob("*-rapl:*") if zone.name.count(":") == 1)
        # A laptop has a zone beside them for the whole platform, whose energy holds theirs already.
        self._zones = [zone for zone in zones if _zone_name(zone) != "psys"]
        if not self._zones:
            raise OSError(f"no RAPL counter under {root}")
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = [self._read(zone) for zone in self._zones]
        self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read_j(self) -> float:
        for place, (zone, span) in enumerate(zip(self._zones, self._ranges, strict=True)):
            now = self._read(zone)
            self._total += (now - self._last[place]) % (span + 1)
            self._last[place] = now
        return self._total / 1e6

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())


def _zone_name(zone: Path) -> str:
    """What a zone counts (``package-0``, ``psys``); empty where the system does not tell."""
    name = zone / "name"
    return name.read_text().strip() if name.exists() else ""


def energy_counter(device: torch.device | str) -> EnergyCounter:
    """The counter of a device, checked by a first reading.

    Raises:
        OSError: there is none, or it may not be read; says why.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return RaplCounter()
    try:
        counter = NvmlCounter(device)
    except ImportError:
        raise OSError("nvidia-ml-py is not installed") from None
    with counter:
        counter.read_j()
    return counter


def energy_problem(device: torch.device | str) -> str | None:
    """Why no energy can be measured on a device; None where it can."""
    try:
        energy_counter(device)
    except OSError as error:
        return " ".join(str(error).split())
    return None


def measure_energy(
    run: Callable[[], object],
    counter: EnergyCounter,
    synchronize: Callable[[], None],
    budget: EnergyBudget,
    *,
    batch: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EnergyReading:
    """Joules of one call of `run`, which makes `batch` calls of what is measured each time.

    Every window runs from one movement of the counter to a later one, at least `budget.window_s` after
    it, and `run` is called without a pause until the last window has ended.
    """
    try:
        with counter:
            idle_w = _idle_watts(counter, budget, clock, sleep)
            return _windows(run, counter, synchronize, budget, batch, clock, idle_w)
    except OSError as error:
        return EnergyReading(source=counter.source, problem=" ".join(str(error).split()))


def _windows(
    run: Callable[[], object],
    counter: EnergyCounter,
    synchronize: Callable[[], None],
    budget: EnergyBudget,
    batch: int,
    clock: Callable[[], float],
    idle_w: float | None,
) -> EnergyReading:
    joules: list[float] = []
    calls = 0  # since the window began
    all_calls = 0
    begun: float | None = None  # None until the counter has moved once
    begun_at = energy = 0.0
    last = counter.read_j()
    started_at = moved_at = clock()
    patience_s = _PATIENCE * budget.windows * budget.window_s
    while len(joules) < budget.windows and not (joules and clock() - started_at > patience_s):
        run()
        synchronize()
        calls += batch
        now, value = clock(), counter.read_j()
        if value <= last:
            if now - moved_at > max(_MOST_TICK_S, budget.window_s):
                return EnergyReading(source=counter.source, problem="the energy counter stands still")
            continue
        last, moved_at = value, now
        if begun is None:
            begun, begun_at, energy, calls = now, now, value, 0
        elif now - begun_at >= budget.window_s:
            joules.append((value - energy) / calls)
            all_calls += calls
            begun_at, energy, calls = now, value, 0
    return EnergyReading(tuple(joules), all_calls, idle_w, counter.source)


def _idle_watts(
    counter: EnergyCounter,
    budget: EnergyBudget,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> float | None:
    """Watts while nothing runs, between two movements of the counter; None where it does not move."""
    if budget.idle_s <= 0:
        return None
    started, first = clock(), counter.read_j()
    begun: tuple[float, float] | None = None
    while True:
        sleep(_POLL_S)
        now, value = clock(), counter.read_j()
        if value > first:
            first = value
            if begun is None:
                begun = (now, value)
            elif now - begun[0] >= budget.idle_s / 2:
                return (value - begun[1]) / (now - begun[0])
        if now - started > budget.idle_s + _MOST_TICK_S:
            return None
