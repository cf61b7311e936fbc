"""What rows say about a claim: findings, each with its interval, and the decision that follows from them.

The rule, the same for every claim:

- A claim is made of parts, and each part expects a figure above or below a bound (a difference above zero, a
  speed-up below 1.05). A part *supports* the claim where its 95 % interval lies on the expected side and the
  test says p < 0.05, it *contradicts* it where both say the other side, else it is *open*. A figure without
  any spread (bytes, counts; outcomes that are equal item by item) is what it is: one side or the other.
- A claim **holds** where all parts support it. All have to, so its p-value is the largest of theirs and
  nothing need be corrected (an intersection-union test).
- It **does not hold** where a part contradicts it. One of them is enough, so the smallest p-value is
  multiplied by their number (Bonferroni).
- Else it is **not decidable** with these rows, and the smallest effect that they would show is given.
- The p-values of all claims of a board are adjusted together (Benjamini-Hochberg); what is no longer below
  0.05 is not decidable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from harness.evaluate.paired import benjamini_hochberg

__all__ = ["LEVEL", "Decision", "Finding", "Outcome", "Side", "adjusted", "concluded", "undecided"]

LEVEL = 0.05


class Outcome(StrEnum):
    """How a claim ended."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does_not_hold"
    NOT_DECIDABLE = "not_decidable"

    @property
    def words(self) -> str:
        return self.value.replace("_", " ")


class Side(StrEnum):
    """Where a figure is expected, or what a finding says to its claim."""

    ABOVE = "above"
    BELOW = "below"
    SUPPORTS = "supports"
    CONTRADICTS = "contradicts"
    OPEN = "open"


@dataclass(frozen=True)
class Finding:
    """One figure of a claim.

    `value` with its 95 % interval is expected `expected` (above or below) `bound`; `p` is the raw two-sided
    p-value of `test` against the bound, None for what has no spread. `n` counts the `unit_of_n` (windows,
    items, rounds); `detectable` is the smallest distance from the bound that would show four times in five.
    `cells` are the ids of the stored cells that it rests on.
    """

    what: str
    value: float
    lower: float
    upper: float
    unit: str
    expected: Side
    bound: float
    test: str
    n: int
    unit_of_n: str
    p: float | None = None
    detectable: float | None = None
    cells: tuple[int, ...] = ()
    note: str = ""

    @property
    def side(self) -> Side:
        """What it says to the claim: supports, contradicts or open."""
        if not self.is_number:
            return Side.OPEN
        if self.p is None or self.lower == self.upper:
            distance = self.value - self.bound if self.expected is Side.ABOVE else self.bound - self.value
            is_there = distance > 1e-9 * max(1.0, abs(self.bound))  # rounding is no effect
            return Side.SUPPORTS if is_there else Side.CONTRADICTS
        if self.p >= LEVEL or self.lower <= self.bound <= self.upper:
            return Side.OPEN
        is_above = self.lower > self.bound
        return Side.SUPPORTS if is_above == (self.expected is Side.ABOVE) else Side.CONTRADICTS

    @property
    def is_number(self) -> bool:
        """Whether nothing of it is NaN, which lies on no side of a bound."""
        return not any(math.isnan(each) for each in (self.value, self.lower, self.upper, self.p or 0.0))

    @property
    def has_spread(self) -> bool:
        return self.p is not None and self.lower != self.upper


@dataclass(frozen=True)
class Decision:
    """What came of a claim: the outcome, why in words, and the findings behind it.

    `p` is the claim's raw p-value and `p_adjusted` that over the board; both None where nothing was tested.
    """

    outcome: Outcome
    why: str
    findings: tuple[Finding, ...] = ()
    p: float | None = None
    p_adjusted: float | None = None
    is_measured: bool = True
    """False where rows are missing, which a run could measure."""

    @property
    def cells(self) -> tuple[int, ...]:
        """The ids of all stored cells that it rests on."""
        return tuple(sorted({cell for finding in self.findings for cell in finding.cells}))


def undecided(why: str, *, is_measured: bool = True, findings: Sequence[Finding] = ()) -> Decision:
    """A decision that there is none."""
    return Decision(Outcome.NOT_DECIDABLE, why, tuple(findings), is_measured=is_measured)


def concluded(findings: Sequence[Finding]) -> Decision:
    """The decision that follows from findings, by the rule of this module. Pure.

    Raises:
        ValueError: there are no findings.
    """
    if not findings:
        raise ValueError("a claim needs at least one finding")
    found = tuple(findings)
    against = [finding for finding in found if finding.side is Side.CONTRADICTS]
    tested = [finding for finding in found if finding.has_spread]
    if against:
        exact = [finding for finding in against if not finding.has_spread]
        if exact:
            return Decision(Outcome.DOES_NOT_HOLD, _against(exact[0]), found)
        strongest = min(against, key=lambda finding: finding.p or 0.0)
        p = min(1.0, (strongest.p or 0.0) * len(found))
        if p < LEVEL:
            return Decision(Outcome.DOES_NOT_HOLD, _against(strongest), found, p)
        why = f"{_against(strongest)}, but not clearly enough as one of {len(found)} figures (p = {p:.2g})"
        return Decision(Outcome.NOT_DECIDABLE, why, found, p)
    if broken := next((finding for finding in found if not finding.is_number), None):
        return Decision(Outcome.NOT_DECIDABLE, f"{_shown(broken)} says nothing", found)
    hardest = max((finding.p or 0.0 for finding in tested), default=None)
    open_ = [finding for finding in found if finding.side is Side.OPEN]
    if open_:
        return Decision(Outcome.NOT_DECIDABLE, _open(open_, len(found)), found, hardest)
    return Decision(Outcome.HOLDS, _for(found), found, hardest)


def adjusted(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions of a board with p-values adjusted over all of them, in their order."""
    tested = [decision.p for decision in decisions if decision.p is not None]
    values = iter(benjamini_hochberg(tested))
    done = []
    for decision in decisions:
        if decision.p is not None:
            decision = replace(decision, p_adjusted=next(values))
            assert decision.p_adjusted is not None
            if decision.outcome is not Outcome.NOT_DECIDABLE and decision.p_adjusted >= LEVEL:
                why = f"{decision.why}, but not among {len(tested)} claims (p = {decision.p_adjusted:.2g})"
                decision = replace(decision, outcome=Outcome.NOT_DECIDABLE, why=why)
        done.append(decision)
    return done


# --- in words -----------------------------------------------------------------------------------------


def _shown(finding: Finding) -> str:
    text = f"{finding.value:.4g}"
    if finding.has_spread:
        text += f" [{finding.lower:.4g}, {finding.upper:.4g}]"
    return f"{finding.what}: {text} {finding.unit}".rstrip()


def _for(found: Sequence[Finding]) -> str:
    weakest = min(found, key=_distance)
    if len(found) == 1:
        return _shown(weakest)
    return f"all {len(found)} figures agree; the closest: {_shown(weakest)}"


def _distance(finding: Finding) -> float:
    """How far the near end of the interval is from the bound, as a share of the value's distance."""
    near = finding.lower if finding.expected is Side.ABOVE else finding.upper
    spread = abs(finding.value - finding.bound)
    return abs(near - finding.bound) / spread if spread else 0.0


def _against(finding: Finding) -> str:
    return f"{_shown(finding)}, where {finding.expected} {finding.bound:g} was claimed"


def _open(open_: Sequence[Finding], count: int) -> str:
    first = open_[0]
    text = f"{_shown(first)} lies on both sides of {first.bound:g}"
    if not first.lower <= first.bound <= first.upper:
        text = f"{_shown(first)}, but p = {first.p:.2g}"
    if first.detectable is not None and math.isfinite(first.detectable):
        text += f"; {first.detectable:.2g} {first.unit} from it would show".replace("  ", " ")
    if len(open_) > 1:
        text += f" (and {len(open_) - 1} more of {count} figures)"
    return text
