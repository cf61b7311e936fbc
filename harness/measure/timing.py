"""Timing a model in a shape: whole runs of greedy generation, marked after every call.

One run is a prefill and all its steps, as a user would wait for it. Its marks give the time to the
first token, the time of every single step and the time of the whole, each measured between its own
two marks; nothing is computed by subtracting one run from another.

Several models are timed in rounds: each runs once a round, the order reversed from round to round, so
that a device that gets warmer or a machine that gets busier slows all of them alike. Where a call was
captured several times, rounds go through the captures, and through all pairs of two lanes' captures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from harness.measure.clock import clock_for, paused_gc
from harness.measure.generation import Generation
from harness.measure.graphs import Call, More, no_more, prepare_forward, prepare_generation

__all__ = [
    "CPU_BUDGET",
    "CUDA_BUDGET",
    "GenerationTimes",
    "Lane",
    "Rounds",
    "Timed",
    "TimingBudget",
    "budget_for",
    "capture_in",
    "more_prefills",
    "run_rounds",
    "time_forward",
    "time_generation",
    "times_of",
]

Run = list[float]  # seconds: the prefill, each step, and last the whole


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


@dataclass
class Lane:
    """A model that is ready to run one shape again and again.

    Attributes:
        prefill: the prompt, or the whole forward pass of an encoder.
        step: one new token; None for an encoder.
        generation: what both work on; None for an encoder.
        steps: how many follow each prefill.
    """

    prefill: Call
    step: Call | None
    generation: Generation | None
    steps: int
    device: torch.device

    @classmethod
    def of_generation(
        cls, model: nn.Module, prompt: torch.Tensor, new_tokens: int, more: More = no_more
    ) -> Self:
        """Greedy generation after `prompt` (int64 [batch, prompt_len]); `more` as of `prepare_generation`."""
        generation = Generation(model, prompt, new_tokens)
        prefill, step = prepare_generation(generation, more)
        return cls(prefill, step, generation, new_tokens, prompt.device)

    @classmethod
    def of_forward(cls, model: nn.Module, tokens: torch.Tensor, more: More = no_more) -> Self:
        """One forward pass over `tokens` (int64 [batch, prompt_len]); `more` as of `prepare_generation`."""
        return cls(prepare_forward(model, tokens, more), None, None, 0, tokens.device)

    @property
    def captures(self) -> int:
        """In how many captures every call of a run exists."""
        return min(self.prefill.captures, self.prefill.captures if self.step is None else self.step.captures)

    def run(self, steps: int | None = None, capture: int = 0) -> Run:
        """One run of so many steps, all of them by default: seconds of each call and of the whole."""
        clock = clock_for(self.device)
        if self.generation is not None:
            self.generation.reset()
        clock.start()
        marks = [clock.mark()]
        self.prefill.run_capture(capture)
        marks.append(clock.mark())
        if self.step is not None:
            for _ in range(self.steps if steps is None else steps):
                self.step.run_capture(capture)
                marks.append(clock.mark())
        return clock.seconds(marks)


@dataclass
class Rounds:
    """The runs of each lane, one a round, and the readings of the control next to them.

    Attributes:
        captures: which capture each run was of.
    """

    runs: list[list[Run]]
    control_s: list[float] = field(default_factory=list)
    captures: list[list[int]] = field(default_factory=list)


def run_rounds(
    lanes: Sequence[Lane], budget: TimingBudget, control: Callable[[], float] | None = None
) -> Rounds:
    """Run all lanes in rounds, after one untimed run of each, and a short one of each further capture.

    Args:
        budget: of each lane; the time for all together is that much for each.
        control: times a fixed workload, once a round.
    """
    rounds = Rounds([[] for _ in lanes], captures=[[] for _ in lanes])
    whole = TimingBudget(budget.least, budget.most, budget.seconds * len(lanes))
    with paused_gc(), torch.inference_mode():
        for lane in lanes:
            lane.run()
            for capture in range(1, lane.captures):  # the first replay of a graph uploads it
                lane.run(1, capture)
        if control is not None:
            control()
        started_at = time.perf_counter()
        done = 0
        while whole.wants_more(done, started_at):
            order = range(len(lanes)) if done % 2 == 0 else range(len(lanes) - 1, -1, -1)
            for index in order:
                capture = capture_in(done, index, lanes[index].captures)
                rounds.runs[index].append(lanes[index].run(capture=capture))
                rounds.captures[index].append(capture)
            if control is not None:
                rounds.control_s.append(control())
            done += 1
    return rounds


def capture_in(number: int, lane: int, captures: int) -> int:
    """Which of so many captures a lane runs in a round: two lanes with as many each meet in all pairs, once
    in each ``captures ** 2`` rounds.

    >>> [(capture_in(i, 0, 2), capture_in(i, 1, 2)) for i in range(4)]
    [(0, 0), (1, 1), (0, 1), (1, 0)]
    """
    return (number + lane * (number // captures)) % captures


def times_of(lane: Lane, runs: Sequence[Run], more_prefills: Sequence[Run] = ()) -> GenerationTimes:
    """The readings of a lane's runs; `more_prefills` are runs without steps."""
    prefill_s = tuple(run[0] for run in [*runs, *more_prefills])
    decode = None
    if lane.step is not None and lane.steps:
        samples = tuple(second for run in runs for second in run[1:-1])
        decode = Timed(samples, lane.step.mode, lane.step.note)
    return GenerationTimes(
        prefill=Timed(prefill_s, lane.prefill.mode, lane.prefill.note),
        decode=decode,
        end_to_end=_whole_times(lane, runs),
    )


def more_prefills(lane: Lane, runs: Sequence[Run], budget: TimingBudget) -> list[Run]:
    """Prefills alone up to the budget, where long generations left room for few runs."""
    if not lane.steps or len(runs) >= budget.most:
        return []
    extra = TimingBudget(0, budget.most - len(runs), budget.seconds)
    found: list[Run] = []
    with paused_gc(), torch.inference_mode():
        started_at = time.perf_counter()
        while extra.wants_more(len(found), started_at):
            found.append(lane.run(0, len(found) % lane.captures))
    return found


def time_generation(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, budget: TimingBudget | None = None
) -> GenerationTimes:
    """Time a decoder on `prompt` (int64 [batch, prompt_len]) and `new_tokens` steps, by itself."""
    budget = budget or budget_for(prompt.device)
    lane = Lane.of_generation(model, prompt, new_tokens)
    runs = run_rounds([lane], budget).runs[0]
    return times_of(lane, runs, more_prefills(lane, runs, budget))


def time_forward(model: nn.Module, tokens: torch.Tensor, budget: TimingBudget | None = None) -> Timed:
    """Time one forward pass over `tokens` (int64 [batch, prompt_len]): all an encoder does."""
    lane = Lane.of_forward(model, tokens)
    runs = run_rounds([lane], budget or budget_for(tokens.device)).runs[0]
    return times_of(lane, runs).prefill


def budget_for(device: torch.device) -> TimingBudget:
    """How often and how long to repeat on a device."""
    return CUDA_BUDGET if device.type == "cuda" else CPU_BUDGET


def _whole_times(lane: Lane, runs: Sequence[Run]) -> Timed:
    samples = tuple(run[-1] for run in runs)
    prefill, step = lane.prefill, lane.step
    if step is None or prefill.mode == step.mode:
        return Timed(samples, prefill.mode, prefill.note)
    note = f"prefill {prefill.mode}, decode {step.mode}: {prefill.note or step.note}"
    least = next(mode for mode in ("eager", "graph") if mode in (prefill.mode, step.mode))
    return Timed(samples, least, note)
