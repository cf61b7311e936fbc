"""Timing a model in a shape: whole runs of greedy generation, marked after every call.

One run is a prefill and all its steps, as a user would wait for it. Its marks give the time to the
first token, the time of every single step and the time of the whole, each measured between its own
two marks; nothing is computed by subtracting one run from another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from harness.measure.clock import Clock, clock_for, paused_gc
from harness.measure.generation import Generation, forward_only
from harness.measure.graphs import Call, prepare_call, prepare_generation

__all__ = [
    "CPU_BUDGET",
    "CUDA_BUDGET",
    "GenerationTimes",
    "Timed",
    "TimingBudget",
    "time_forward",
    "time_generation",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TimingBudget:
    """When to stop repeating: at `most` repeats, or after `seconds` but with at least `least`."""

    least: int
    most: int
    seconds: float

    def wants_more(self, done: int, started_at: float) -> bool:
        if done < self.least:
            return True
        return done < self.most and time.perf_counter() - started_at < self.seconds


CPU_BUDGET = TimingBudget(least=3, most=15, seconds=1.5)
CUDA_BUDGET = TimingBudget(least=5, most=50, seconds=2.0)


@dataclass(frozen=True, slots=True)
class Timed:
    """Readings in seconds, with how they were taken (`mode`, see `Call`) and why so (`note`)."""

    samples_s: tuple[float, ...]
    mode: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationTimes:
    """Readings of one shape; `decode` has one reading a step, None where nothing is decoded."""

    prefill: Timed
    decode: Timed | None
    end_to_end: Timed


def time_generation(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, budget: TimingBudget | None = None
) -> GenerationTimes:
    """Time a decoder on `prompt` (int64 [batch, prompt_len]) and `new_tokens` steps.

    The budget bounds whole runs; where those are few, prefills alone are added up to the budget.
    """
    budget = budget or _budget(prompt.device)
    clock = clock_for(prompt.device)
    generation = Generation(model, prompt, new_tokens)
    prefill, step = prepare_generation(generation)

    def one_run(steps: int) -> list[float]:
        generation.reset()
        clock.start()
        marks = [clock.mark()]
        prefill.run()
        marks.append(clock.mark())
        for _ in range(steps):
            step.run()
            marks.append(clock.mark())
        return clock.seconds(marks)

    runs = _repeat(lambda: one_run(new_tokens), budget)
    prefill_s = [run[0] for run in runs]
    if new_tokens and len(runs) < budget.most:
        extra = TimingBudget(0, budget.most - len(runs), budget.seconds)
        prefill_s += [run[0] for run in _repeat(lambda: one_run(0), extra, warm=False)]
    times = GenerationTimes(
        prefill=Timed(tuple(prefill_s), prefill.mode, prefill.note),
        decode=_decode_times(runs, step) if new_tokens else None,
        end_to_end=_whole_times(runs, prefill, step),
    )
    if prompt.device.type == "cuda":
        # The graphs keep their memory pools; what is measured after this must not see them.
        del generation, prefill, step, clock
        torch.cuda.empty_cache()
    return times


def time_forward(model: nn.Module, tokens: torch.Tensor, budget: TimingBudget | None = None) -> Timed:
    """Time one forward pass over `tokens` (int64 [batch, prompt_len]): all an encoder does."""
    clock = clock_for(tokens.device)
    call = prepare_call(lambda: forward_only(model, tokens), tokens.device)
    runs = _repeat(lambda: _one_call(call, clock), budget or _budget(tokens.device))
    return Timed(tuple(runs), call.mode, call.note)


def _one_call(call: Call, clock: Clock) -> float:
    clock.start()
    marks = [clock.mark()]
    call.run()
    marks.append(clock.mark())
    return clock.seconds(marks)[0]


def _repeat(run: Callable[[], T], budget: TimingBudget, *, warm: bool = True) -> list[T]:
    results: list[T] = []
    with paused_gc(), torch.inference_mode():
        if warm:
            run()
        started_at = time.perf_counter()
        while budget.wants_more(len(results), started_at):
            results.append(run())
    return results


def _decode_times(runs: list[list[float]], step: Call) -> Timed:
    return Timed(tuple(second for run in runs for second in run[1:-1]), step.mode, step.note)


def _whole_times(runs: list[list[float]], prefill: Call, step: Call) -> Timed:
    samples = tuple(run[-1] for run in runs)
    if prefill.mode == step.mode:
        return Timed(samples, step.mode, step.note)
    note = f"prefill {prefill.mode}, decode {step.mode}: {prefill.note or step.note}"
    return Timed(samples, "eager", note)


def _budget(device: torch.device) -> TimingBudget:
    return CUDA_BUDGET if device.type == "cuda" else CPU_BUDGET
