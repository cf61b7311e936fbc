"""What this very device can do at most: matrix products, copies, reads, launches.

Measured once at the start of a sweep, in a worker, in a second or two, and stored in the sweep's manifest.
The best of several repeats counts: a ceiling is what can be reached, not what is usual.

=====================  =============  ================================================================
ceiling                unit           what runs
=====================  =============  ================================================================
``matmul_bfloat16`` …  FLOP/s         a large square product of that type (2 n³ operations); ``float32``
                                      as torch is set, ``tf32`` with TensorFloat-32 allowed
``copy``               B/s            one tensor onto another, bytes read plus bytes written
``read``               B/s            the sum of a tensor, bytes read
``launch``             s              a kernel of one element, called from the host again and again
``graph_launch``       s              the same inside a replayed CUDA graph (CUDA only)
=====================  =============  ================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["UNITS", "Ceilings", "ceilings_of_sweep", "measure_ceilings"]

TIMEOUT_S = 120.0  # a first touch of CUDA may take long; the measuring itself takes one or two seconds
_GPU_SIDE, _CPU_SIDE = 8192, 512
_GPU_BYTES, _CPU_BYTES = 1 << 30, 1 << 26  # far beyond the caches
_GPU_BUDGET_S, _CPU_BUDGET_S = 0.1, 0.025  # for each ceiling
_REPEATS = 20
_LAUNCHES = 200
UNITS = {"matmul": "FLOP/s", "copy": "B/s", "read": "B/s", "launch": "s", "graph": "s"}
"""The unit of a ceiling, by the first word of its name."""

_DTYPES = ("bfloat16", "float16", "float32", "tf32", "int8", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The ceilings by name, in FLOP/s, B/s and s; `notes` says why one of them is missing."""

    device_name: str = ""
    threads: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> Ceilings:
        """From a manifest's ``ceilings``; without any where nothing was measured."""
        if not stored:
            return cls()
        return cls(
            str(stored.get("device_name", "")),
            int(stored.get("threads", 0)),
            dict(stored.get("values", {})),
            tuple(stored.get("notes", ())),
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "values": dict(self.values), "notes": list(self.notes)}

    def matmul_flops_per_s(self, dtype: str) -> float | None:
        """The ceiling of products of a type (``bfloat16``), None where it was not measured."""
        return self.values.get(f"matmul_{dtype}")

    @property
    def bytes_per_s(self) -> float | None:
        """The fastest that bytes were read or copied: what decoding is held against."""
        known = [self.values[name] for name in ("read", "copy") if name in self.values]
        return max(known, default=None)


def ceilings_of_sweep(device: str, threads: int) -> dict[str, Any]:
    """Measure in a process of its own, so that this one never touches CUDA; as a manifest stores it.

    A failure is a note in what is returned, never an error.
    """
    from harness.executors.calling import call_in_worker

    try:
        found: Ceilings = call_in_worker(measure_ceilings, device, threads, timeout_s=TIMEOUT_S)
    except HarnessError as error:
        found = Ceilings(threads=threads, notes=(f"not measured: {error}",))
    return found.as_json()


def measure_ceilings(device_name_: str, threads: int) -> Ceilings:
    """Measure every ceiling that this device has.

    Args:
        device_name_: ``cpu``, ``cuda`` or ``cuda:1``.
        threads: how many threads a worker has on the CPU.
    """
    import torch

    from harness.measure.machine import device_name

    device = torch.device(device_name_)
    torch.set_num_threads(max(1, threads))
    values: dict[str, float] = {}
    notes: list[str] = []

    def measure(name: str, function: Callable[[], float]) -> None:
        try:
            values[name] = function()
        except RuntimeError as error:  # a type that the device has no product of; out of memory
            lines = str(error).strip().splitlines()
            notes.append(f"{name}: {lines[0] if lines else type(error).__name__}")

    with torch.inference_mode():
        for dtype in _DTYPES:
            if dtype in ("tf32", "float8_e4m3fn") and device.type != "cuda":
                continue
            measure(f"matmul_{dtype}", partial(_matmul, dtype, device))
        measure("copy", partial(_copy, device))
        measure("read", partial(_read, device))
        measure("launch", partial(_launch, device))
        if device.type == "cuda":
            measure("graph_launch", partial(_graph_launch, device))
    return Ceilings(device_name(device), threads, values, tuple(notes))


# --- one by one ---------------------------------------------------------------------------------------


def _matmul(dtype: str, device: torch.device) -> float:
    import torch

    side = _GPU_SIDE if device.type == "cuda" else _CPU_SIDE
    if dtype == "int8":
        a = torch.randint(-127, 127, (side, side), dtype=torch.int8, device=device)
        seconds = _best_seconds(lambda: torch._int_mm(a, a.t()), device)
    elif dtype == "float8_e4m3fn":
        codes = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        seconds = _best_seconds(
            lambda: torch._scaled_mm(codes, codes.t(), one, one, out_dtype=torch.bfloat16), device
        )
    else:
        real = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        b = torch.randn(side, side, device=device).to(real)
        with _tf32_allowed(dtype == "tf32"):
            seconds = _best_seconds(lambda: b @ b, device)
    return 2.0 * side**3 / seconds


@contextmanager
def _tf32_allowed(force: bool) -> Iterator[None]:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    if force:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _copy(device: torch.device) -> float:
    import torch

    source = torch.ones(_buffer_bytes(device) // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _read(device: torch.device) -> float:
    import torch

    source = torch.ones(_buffer_bytes(device) // 4, device=device)
    return source.nbytes / _best_seconds(lambda: source.sum(), device)


def _buffer_bytes(device: torch.device) -> int:
    import torch

    if device.type != "cuda":
        return _CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(_GPU_BYTES, free // 8)


def _launch(device: torch.device) -> float:
    """Seconds from one tiny kernel to the next where the host issues them one by one."""
    import torch

    scalar = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            scalar.add_(1)

    return _best_host_seconds(many, device) / _LAUNCHES


def _graph_launch(device: torch.device) -> float:
    """The same where a graph issues them."""
    import torch

    scalar = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    scalar.add_(1)
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            scalar.add_(1)
    return _best_seconds(graph.replay, device) / _LAUNCHES


# --- timing -------------------------------------------------------------------------------------------


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of one call; on CUDA by events, with the launch hidden behind a spin."""
    from harness.measure.clock import clock_for

    clock = clock_for(device)
    budget = _GPU_BUDGET_S if device.type == "cuda" else _CPU_BUDGET_S
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        run()
    best: float | None = None
    for _ in range(_REPEATS):
        clock.start()
        marks = [clock.mark()]
        run()
        marks.append(clock.mark())
        seconds = clock.seconds(marks)[0]
        best = seconds if best is None else min(best, seconds)
        if time.perf_counter() - started > budget:
            break
    assert best is not None
    return best


def _best_host_seconds(run: Callable[[], object], device: torch.device) -> float:
    """As `_best_seconds`, by the host's clock until the device is done."""
    import torch

    best: float | None = None
    for _ in range(4):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        best = seconds if best is None else min(best, seconds)
    assert best is not None
    return best
