"""Timing a variant in a scenario, in turn with the baseline where both fit into memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness.errors import first_line
from harness.measure.control import Control
from harness.measure.generation import random_prompt
from harness.measure.graphs import Call, More
from harness.measure.inspecting import inspect_forward, inspect_generation
from harness.measure.meter import Measured
from harness.measure.pairing import LEAST_ROUNDS, Ratio, speedups
from harness.measure.timing import (
    GenerationTimes,
    Lane,
    Timed,
    TimingBudget,
    budget_for,
    more_prefills,
    run_rounds,
    times_of,
)

__all__ = ["Pair", "ScenarioTimes", "scenario_times"]

_SHARED = "scenario_times"
_SPARE_BYTES = 512 << 20
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Pair:
    """What rounds with the baseline say, by phase: the speed-ups, how both ran, and what differs."""

    speedups: dict[str, Ratio]
    modes: dict[str, str]
    notes: dict[str, str | None]


@dataclass(frozen=True)
class ScenarioTimes:
    """What the meters of time make their records of.

    Attributes:
        own: the variant's readings.
        control: the fixed workload's.
        pair: None for the baseline, and where `alone` says why it was timed by itself.
    """

    own: GenerationTimes
    control: Timed
    pair: Pair | None
    alone: str | None


def scenario_times(measured: Measured) -> ScenarioTimes:
    """The readings of a cell, timed when they are first asked for."""
    if _SHARED not in measured.shared:
        measured.shared[_SHARED] = _time(measured)
        if measured.device.type == "cuda":
            # The graphs kept their memory pools; what is measured after this must not see them.
            gc.collect()
            torch.cuda.empty_cache()
    times = measured.shared[_SHARED]
    assert isinstance(times, ScenarioTimes)
    return times


def _time(measured: Measured) -> ScenarioTimes:
    scenario, device = measured.scenario, measured.device
    prompt = random_prompt(
        measured.info.vocab_size, scenario.batch_size, scenario.prompt_len, measured.seed, device
    )
    budget = budget_for(device)
    held_before = _held_bytes(device)
    lane = _lane(measured.model.eval(), prompt, measured, _room(measured, held_before))
    control = Control(device)
    baseline, alone = _baseline_lane(measured, prompt, _held_bytes(device) - held_before)
    pair = None
    if baseline is None:
        rounds = run_rounds([lane], budget, control)
    else:
        enough = TimingBudget(max(budget.least, LEAST_ROUNDS), max(budget.most, LEAST_ROUNDS), budget.seconds)
        rounds = run_rounds([lane, baseline], enough, control)
        captures = list(zip(rounds.captures[1], rounds.captures[0], strict=True))
        pair = _pair(lane, baseline, speedups(rounds.runs[1], rounds.runs[0], captures))
    del baseline
    runs = rounds.runs[0]
    own = times_of(lane, runs, more_prefills(lane, runs, budget))
    _inspect(lane, measured)
    return ScenarioTimes(own, Timed(tuple(rounds.control_s), control.mode, control.note), pair, alone)


def _inspect(lane: Lane, measured: Measured) -> None:
    """Last, because profiling slows what it watches, but while the graphs are alive."""
    if lane.generation is None or lane.step is None:
        inspect_forward(lane.prefill, measured)
    else:
        inspect_generation(lane.generation, lane.prefill, lane.step, measured)


def _lane(model: nn.Module, prompt: torch.Tensor, measured: Measured, more: More) -> Lane:
    if measured.info.kind == "encoder":
        return Lane.of_forward(model, prompt, more)
    return Lane.of_generation(model, prompt, measured.scenario.new_tokens, more)


def _room(measured: Measured, held_before: int) -> More:
    """Whether one more capture leaves room for the baseline and its own: a measure for the variant's lane."""

    def more(taken_bytes: int) -> bool:
        needed = _once_more(taken_bytes)
        if measured.baseline is not None:
            working = _held_bytes(measured.device) - held_before + taken_bytes
            needed += _beside(measured, working)
        return _fits(needed, measured.device)

    return more


def _once_more(taken_bytes: int) -> int:
    """What a further capture needs: eager calls, with which captures are compared, take as much beside it."""
    return 2 * taken_bytes


def _beside(measured: Measured, working_bytes: int) -> int:
    """What the baseline needs where the variant's lane took so much beside the weights."""
    return measured.baseline_bytes + int(1.2 * max(0, working_bytes))


def _fits(needed_bytes: int, device: torch.device) -> bool:
    free = _free_bytes(device)
    return free is None or needed_bytes + _SPARE_BYTES <= free


def _baseline_lane(
    measured: Measured, prompt: torch.Tensor, working_bytes: int
) -> tuple[Lane | None, str | None]:
    """The baseline ready to run, or why the variant is timed alone (nothing for the baseline itself).

    `working_bytes` is what the variant's own lane took, its cache and the pools of its graphs: the
    baseline will need about as much beside its weights.
    """
    if measured.baseline is None:
        return None, None
    needed = _beside(measured, working_bytes) + _SPARE_BYTES
    free = _free_bytes(measured.device)
    if free is not None and needed > free:
        wanted = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return None, f"not in turn with the baseline, which does not fit beside it ({wanted})"

    def more(taken_bytes: int) -> bool:
        return _fits(_once_more(taken_bytes), measured.device)

    try:
        return _lane(measured.baseline().eval(), prompt, measured, more), None
    except (torch.OutOfMemoryError, MemoryError) as error:
        # What it needs was underestimated: that must not cost the variant its own numbers.
        reason = first_line(error)
    gc.collect()
    if measured.device.type == "cuda":
        torch.cuda.empty_cache()
    return None, f"not in turn with the baseline, for which memory ran out beside it: {reason}"


def _pair(lane: Lane, baseline: Lane, found: dict[str, Ratio]) -> Pair:
    modes: dict[str, str] = {}
    notes: dict[str, str | None] = {}
    for phase in found:
        own, other = (_mode(each, phase) for each in (lane, baseline))
        modes[phase] = own
        notes[phase] = None if own == other else f"the baseline ran {other}"
    return Pair(found, modes, notes)


def _mode(lane: Lane, phase: str) -> str:
    calls: dict[str, list[Call | None]] = {
        "prefill": [lane.prefill],
        "decode": [lane.step],
        "end_to_end": [lane.prefill, lane.step],
    }
    modes = {call.mode for call in calls[phase] if call is not None}
    return next((mode for mode in ("eager", "graph") if mode in modes), lane.prefill.mode)


def _held_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_reserved(device)


def _free_bytes(device: torch.device) -> int | None:
    """What can still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
