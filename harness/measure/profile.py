"""Which kernels really ran, and their share of the time: one prefill and one decode step.

torch.profiler on the very calls that were timed. On CUDA, CUPTI sees every kernel, those inside a replayed
graph included; on the CPU the operators of ATen are counted by the time that they spend in themselves, in
the quietest of a few runs. Profiling slows the call that it watches, so it runs after everything that is
timed, and its seconds are for shares only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from harness.measure.generation import Generation
from harness.measure.graphs import Call
from harness.measure.kernel_names import family_of, readable
from harness.records import KernelUse

__all__ = [
    "GenerationProfile",
    "KernelTime",
    "PhaseProfile",
    "kernel_uses",
    "profile_forward",
    "profile_generation",
]

HOST_PROFILES, HOST_S = 5, 0.3  # on the CPU at most so many, as long as they took less
MAX_KERNELS = 40  # rows a phase; the rest is added up by family
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One launch (or several of one name), as the profiler reports it."""

    name: str
    seconds: float
    calls: int = 1


@dataclass(frozen=True, slots=True)
class PhaseProfile:
    """The kernels of one call, the slowest first; `problem` says why there are none."""

    kernels: tuple[KernelUse, ...] = ()
    problem: str | None = None

    @property
    def seconds(self) -> float:
        """The time of all kernels together."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def calls(self) -> int:
        return sum(kernel.calls for kernel in self.kernels)


@dataclass(frozen=True, slots=True)
class GenerationProfile:
    """Both phases; `decode` is None where nothing is decoded."""

    prefill: PhaseProfile
    decode: PhaseProfile | None = None

    @property
    def kernels(self) -> tuple[KernelUse, ...]:
        return self.prefill.kernels + (self.decode.kernels if self.decode is not None else ())


def profile_generation(generation: Generation, prefill: Call, step: Call | None) -> GenerationProfile:
    """Profile one prefill and one step (if any) of a prepared generation. Leaves it in need of a `reset`.

    What the profiler refuses is the phase's `problem`; nothing is raised for it.
    """
    device = generation.prompt.device

    def filled() -> None:
        generation.reset()
        prefill.run()

    with torch.inference_mode():
        found = _profile("prefill", prefill.run, device, generation.reset)
        if step is None or generation.new_tokens == 0:
            return GenerationProfile(found)
        return GenerationProfile(found, _profile("decode", step.run, device, filled))


def profile_forward(call: Call, device: torch.device) -> GenerationProfile:
    """Profile the one call of an encoder."""
    with torch.inference_mode():
        return GenerationProfile(_profile("prefill", call.run, device))


def kernel_uses(phase: str, times: Iterable[KernelTime]) -> tuple[KernelUse, ...]:
    """Kernels by readable name, slowest first; beyond `MAX_KERNELS` one row a family. Shares add up to 1."""
    by_name: dict[str, list[KernelTime]] = {}
    for each in times:
        by_name.setdefault(readable(each.name), []).append(each)
    rows = [
        KernelUse(phase, name, family_of(name), _calls(same), _seconds(same), 0.0)
        for name, same in by_name.items()
    ]
    rows.sort(key=lambda row: (-row.seconds, row.name))
    rows = rows[:MAX_KERNELS] + _added_up(phase, rows[MAX_KERNELS:])
    total = sum(row.seconds for row in rows)
    return tuple(
        KernelUse(
            row.phase, row.name, row.family, row.calls, row.seconds, row.seconds / total if total else 0.0
        )
        for row in rows
    )


def _added_up(phase: str, rows: list[KernelUse]) -> list[KernelUse]:
    families: dict[str, list[KernelUse]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    return [
        KernelUse(
            phase,
            f"({len(same)} other {family} kernels)",
            family,
            sum(row.calls for row in same),
            sum(row.seconds for row in same),
            0.0,
        )
        for family, same in families.items()
    ]


def _calls(times: Iterable[KernelTime]) -> int:
    return sum(each.calls for each in times)


def _seconds(times: Iterable[KernelTime]) -> float:
    return sum(each.seconds for each in times)


# --- the profiler -------------------------------------------------------------------------------------


def _profile(
    phase: str, run: Run, device: torch.device, before: Callable[[], object] = lambda: None
) -> PhaseProfile:
    try:
        if device.type == "cuda":
            before()
            times = _device_kernels(run, device)
        else:
            times = _quietest(run, before)
    except RuntimeError as error:  # CUPTI refused, another profiler is attached, out of memory
        lines = str(error).strip().splitlines()
        return PhaseProfile(problem=f"not profiled: {lines[0] if lines else type(error).__name__}")
    kernels = kernel_uses(phase, times)
    if not kernels:
        return PhaseProfile(problem="not profiled: the profiler saw no kernel (CUPTI may not be permitted)")
    return PhaseProfile(kernels)


def _device_kernels(run: Run, device: torch.device) -> list[KernelTime]:
    # CUPTI that is torn down and started again can crash a process that replays CUDA graphs.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    torch.cuda.synchronize(device)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profiler:
        run()
        torch.cuda.synchronize(device)
    return [
        KernelTime(event.name, event.time_range.elapsed_us() / 1e6)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


def _quietest(run: Run, before: Callable[[], object]) -> list[KernelTime]:
    """The shortest of a few profiles: in the others something else had the processor for a while."""
    profiles: list[list[KernelTime]] = []
    started_at = time.perf_counter()
    while len(profiles) < HOST_PROFILES and (not profiles or time.perf_counter() - started_at < HOST_S):
        before()
        profiles.append(_host_operators(run))
    return min(profiles, key=_seconds)


def _host_operators(run: Run) -> list[KernelTime]:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        run()
    return [
        KernelTime(event.key, event.self_cpu_time_total / 1e6, event.count)
        for event in profiler.key_averages()
        if event.self_cpu_time_total > 0 and not event.is_user_annotation
    ]
