"""The executable survey: claims, what they need, and what rows of a store say about them.

`claim` and `decision` are the contract, `deciding` what predicates are made of, `board` asks all of them,
`running` measures what is missing.
"""

from __future__ import annotations

from harness.claims.board import BoardRow, board, chosen, counts, in_order
from harness.claims.claim import SECTIONS, Claim, SweepNeed
from harness.claims.deciding import (
    Part,
    all_of,
    exponent_above,
    exponent_below,
    exponent_lower,
    faster,
    gains_more,
    loses_at_most,
    loses_less,
    no_faster,
    repairs,
    slower,
    times_smaller,
)
from harness.claims.decision import Decision, Finding, Outcome, Side, concluded, undecided
from harness.claims.evidence import Evidence, Incomparable, NotMeasured, StoredCell

__all__ = [
    "SECTIONS",
    "BoardRow",
    "Claim",
    "Decision",
    "Evidence",
    "Finding",
    "Incomparable",
    "NotMeasured",
    "Outcome",
    "Part",
    "Side",
    "StoredCell",
    "SweepNeed",
    "all_of",
    "board",
    "chosen",
    "concluded",
    "counts",
    "exponent_above",
    "exponent_below",
    "exponent_lower",
    "faster",
    "gains_more",
    "in_order",
    "loses_at_most",
    "loses_less",
    "no_faster",
    "repairs",
    "slower",
    "times_smaller",
    "undecided",
]
