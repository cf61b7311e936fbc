"""Two or more sides by side: ratios for times and sizes, paired tests for quality, gates for CI."""

from __future__ import annotations

from harness.comparing.break_even import BreakEvenRow, break_even_batches
from harness.comparing.comparison import Comparison
from harness.comparing.gates import Gate, Outcome, judged, parse_gate, read_gates
from harness.comparing.lengths import LengthSweep, length_sweeps
from harness.comparing.matching import Absent
from harness.comparing.methods import Compared, adjusted, compare_methods, compare_sides, incomparable
from harness.comparing.ratios import Reading, TimingRatio, timing_ratio
from harness.comparing.sides import Side, SideName, Stores, load_side, other_methods, parse_side, parse_sides

__all__ = [
    "Absent",
    "BreakEvenRow",
    "Compared",
    "Comparison",
    "Gate",
    "LengthSweep",
    "Outcome",
    "Reading",
    "Side",
    "SideName",
    "Stores",
    "TimingRatio",
    "adjusted",
    "break_even_batches",
    "compare_methods",
    "compare_sides",
    "incomparable",
    "judged",
    "length_sweeps",
    "load_side",
    "other_methods",
    "parse_gate",
    "parse_side",
    "parse_sides",
    "read_gates",
    "timing_ratio",
]
