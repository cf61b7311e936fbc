"""The A/A check: two identical baselines timed as if they were baseline and variant.

Whatever is found there is the method of measuring, not a difference: the medians must lie within one
per cent of each other, and intervals that claim to cover the truth 95 times in 100 must cover a ratio of
one about that often. A machine on which this fails cannot tell small differences apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.measure.generation import random_prompt
from harness.measure.graphs import CAPTURES
from harness.measure.pairing import Ratio, speedups
from harness.measure.timing import Lane, TimingBudget, run_rounds
from harness.records import Scenario

__all__ = ["LARGEST_DIFFERENCE", "STATED_RATE", "SelfComparison", "compare_with_itself", "judge"]

LARGEST_DIFFERENCE = 0.01
STATED_RATE = 0.95
_DOUBT = 0.01  # how improbable the number of misses must be before the rate counts as not kept
ROUNDS_EACH = CAPTURES**2  # every pair of captures once
COMPARISONS = {"cpu": 20, "cuda": 8}


@dataclass(frozen=True, slots=True)
class SelfComparison:
    """One phase of an A/A check.

    Attributes:
        phase: ``prefill``, ``decode`` or ``end_to_end``.
        mode: how it ran.
        ratio: first model over second, median over all rounds; 1 where nothing is wrong.
        largest: the largest distance from 1 of a single comparison's median.
        comparisons: how many comparisons of `ROUNDS_EACH` rounds.
        covering: how many of their intervals covered 1.
        problem: what is wrong, or None.
    """

    phase: str
    mode: str
    ratio: float
    lower: float | None
    upper: float | None
    largest: float
    comparisons: int
    covering: int
    problem: str | None


def compare_with_itself(
    first: nn.Module,
    second: nn.Module,
    vocab_size: int,
    scenario: Scenario,
    device: torch.device,
    *,
    comparisons: int | None = None,
) -> list[SelfComparison]:
    """Time two copies of one decoder in turn, `comparisons` times `ROUNDS_EACH` rounds.

    Both are captured anew for each comparison: one set of captures would give one answer many times.
    """
    prompt = random_prompt(vocab_size, scenario.batch_size, scenario.prompt_len, 0, device)

    def lanes() -> list[Lane]:
        return [
            Lane.of_generation(model.eval(), prompt, scenario.new_tokens, lambda _: True)
            for model in (first, second)
        ]

    rounds = TimingBudget(ROUNDS_EACH, ROUNDS_EACH, 0.0)
    found: dict[str, list[Ratio]] = {}
    pair = lanes()
    for number in range(comparisons or COMPARISONS[device.type]):
        # The last pair is alive while the next one is captured, which so lies elsewhere.
        pair = lanes() if number and pair[0].captures > 1 else pair
        timed = run_rounds(pair, rounds)
        captures = list(zip(timed.captures[0], timed.captures[1], strict=True))
        for phase, ratio in speedups(timed.runs[0], timed.runs[1], captures).items():
            found.setdefault(phase, []).append(ratio)
    prefill, step = pair[0].prefill, pair[0].step
    modes = {"prefill": prefill.mode, "decode": step and step.mode}
    return [judge(phase, modes.get(phase) or prefill.mode, each) for phase, each in found.items()]


def judge(phase: str, mode: str, found: Sequence[Ratio]) -> SelfComparison:
    """What the comparisons of one phase say about measuring: pure."""
    from scipy.stats import binom  # half a second that commands which measure nothing need not wait

    everything = [sample for ratio in found for sample in ratio.samples]
    middle = statistics.median(everything)
    bounded = [(r.lower, r.upper) for r in found if r.lower is not None and r.upper is not None]
    covering = sum(lower <= 1.0 <= upper for lower, upper in bounded)
    n = len(found)
    problem = None
    if abs(middle - 1) >= LARGEST_DIFFERENCE:
        problem = f"two identical models differ by {100 * abs(middle - 1):.1f} %"
    elif binom.cdf(covering, n, STATED_RATE) < _DOUBT:
        problem = f"only {covering} of {n} intervals cover 1, where {STATED_RATE:.0%} should"
    return SelfComparison(
        phase=phase,
        mode=mode,
        ratio=middle,
        lower=min((lower for lower, _ in bounded), default=None),
        upper=max((upper for _, upper in bounded), default=None),
        largest=max(abs(ratio.value - 1) for ratio in found),
        comparisons=n,
        covering=covering,
        problem=problem,
    )
