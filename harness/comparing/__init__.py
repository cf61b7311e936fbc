"""Two or more variants side by side: ratios for times and sizes, paired tests for quality, gates for CI."""

from __future__ import annotations

from harness.comparing.break_even import BreakEvenRow, break_even_batches
from harness.comparing.comparison import Comparison
from harness.comparing.gates import Gate, parse_gate, tripped
from harness.comparing.lengths import LengthSweep, length_sweeps
from harness.comparing.methods import adjusted, compare_methods, incomparable
from harness.comparing.ratios import Reading, TimingRatio, timing_ratio

__all__ = [
    "BreakEvenRow",
    "Comparison",
    "Gate",
    "LengthSweep",
    "Reading",
    "TimingRatio",
    "adjusted",
    "break_even_batches",
    "compare_methods",
    "incomparable",
    "length_sweeps",
    "parse_gate",
    "timing_ratio",
    "tripped",
]
