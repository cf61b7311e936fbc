"""Everything that is learnt from a prepared generation after it was timed: energy and kernels.

One call from the place that times, while the captured graphs are alive; energy first, the profiler last,
because it slows whatever it watches. What is found lies in `Measured.shared` for the meters in
`harness.measure.explaining`. Nothing here fails a cell: what cannot be measured leaves its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from harness.measure.energy import (
    CPU_ENERGY,
    CUDA_ENERGY,
    EnergyReading,
    energy_counter,
    measure_energy,
)
from harness.measure.generation import Generation
from harness.measure.graphs import Call
from harness.measure.meter import Measured
from harness.measure.profile import GenerationProfile, profile_forward, profile_generation

__all__ = ["ENERGY", "KERNELS", "PROFILE", "PhaseEnergy", "inspect_forward", "inspect_generation"]

ENERGY, KERNELS, PROFILE = "energy", "kernels", "profile"
"""Names in `Measured.shared`: a `PhaseEnergy`, a tuple of `KernelUse`, a `GenerationProfile`."""

_BATCH_S = 0.01  # how long the device works between two looks at the counter
_MOST_CALLS = 64


@dataclass(frozen=True, slots=True)
class PhaseEnergy:
    """Joules of one prefill and of one step; `decode` is None where nothing is decoded."""

    prefill: EnergyReading
    decode: EnergyReading | None = None


def inspect_generation(generation: Generation, prefill: Call, step: Call | None, measured: Measured) -> None:
    """Measure energy and kernels of a prepared and timed generation into `measured.shared`.

    `step` is None where nothing is decoded.
    Takes two to three seconds on a GPU, on a CPU one more run. Leaves the generation in need of a
    `reset`.
    """
    with torch.inference_mode():
        measured.shared[ENERGY] = _energy(generation, prefill, step, measured.device)
    _keep(profile_generation(generation, prefill, step), measured)


def inspect_forward(call: Call, measured: Measured) -> None:
    """The same for the one call of an encoder."""
    with torch.inference_mode():
        measured.shared[ENERGY] = PhaseEnergy(_energy_of(call.run, measured.device))
    _keep(profile_forward(call, measured.device), measured)


def _keep(profile: GenerationProfile, measured: Measured) -> None:
    measured.shared[PROFILE] = profile
    measured.shared[KERNELS] = profile.kernels


def _energy(generation: Generation, prefill: Call, step: Call | None, device: torch.device) -> PhaseEnergy:
    def one_prefill() -> None:
        generation.reset()
        prefill.run()

    of_prefill = _energy_of(one_prefill, device)
    if step is None or generation.new_tokens == 0:
        return PhaseEnergy(of_prefill)
    if of_prefill.problem is not None:
        return PhaseEnergy(of_prefill, of_prefill)
    if generation.capture_problem is not None:
        # Going back means another prefill, whose energy would be counted as the steps'.
        problem = f"the steps cannot be repeated alone: {generation.capture_problem}"
        return PhaseEnergy(of_prefill, EnergyReading(source=of_prefill.source, problem=problem))
    one_prefill()
    left = generation.new_tokens

    def one_step() -> None:
        nonlocal left
        if left == 0:
            generation.rewind()
            left = generation.new_tokens
        step.run()
        left -= 1

    return PhaseEnergy(of_prefill, _energy_of(one_step, device, of_prefill.idle_w))


def _energy_of(run: Callable[[], object], device: torch.device, idle_w: float | None = None) -> EnergyReading:
    try:
        counter = energy_counter(device)
    except OSError as error:
        return EnergyReading(problem=" ".join(str(error).split()))
    cuda = device.type == "cuda"

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    run()
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    seconds = max(time.perf_counter() - started, 1e-6)
    batch = max(1, min(_MOST_CALLS, int(_BATCH_S / seconds)))

    def many() -> None:
        for _ in range(batch):
            run()

    budget = CUDA_ENERGY if cuda else CPU_ENERGY
    if idle_w is not None:  # known already: no rest is needed
        budget = replace(budget, idle_s=0.0)
    reading = measure_energy(many, counter, synchronize, budget, batch=batch)
    return reading if idle_w is None else replace(reading, idle_w=idle_w)
