"""What a comparison says."""

from __future__ import annotations

from dataclasses import dataclass

from harness.comparability import Difference

__all__ = ["Comparison"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of two variants: `a` is what one has, `b` what one might take.

    `ratio` is b/a with its interval for times and sizes; `difference` is b - a with its interval for
    quality; `basis` says what they rest on:

    - ``paired``: rounds in which both were timed in turn in one process (their ratios are the readings);
    - ``paired quotient``: both were timed so against the baseline, and this is the quotient;
    - ``control``: each time divided by a fixed workload's that was timed next to it;
    - ``unpaired``: two medians taken at different times, so that a drift of the machine counts as a
      difference;
    - ``speed-ups``: of two sweeps or stores, each one's own speed-up over its own baseline, whose readings
      are ratios of rounds: no drift of the machine between the two is in it;
    - ``items``: the same items of a task; ``reading``: single readings without an interval;
    - ``same measurement``: both sides hold the very same one, so nothing was compared.

    `p_raw` is the two-sided p-value of the paired `test` and `p` is adjusted for all `tests` of the whole
    comparison (Benjamini-Hochberg); `detectable` is the smallest difference that this many items (`n`)
    would show, `flips` the share of them that changed sides. `side_a` and `side_b` are the two as they
    were written in the call. `verdict` puts it in words. `differences`
    keep the two from being compared; `flags` are what a reader must know.
    """

    model: str
    cell: str
    metric: str
    unit: str
    a: float
    b: float
    ratio: float | None = None
    difference: float | None = None
    lower: float | None = None
    upper: float | None = None
    p: float | None = None
    test: str | None = None
    detectable: float | None = None
    method_a: str = ""
    method_b: str = ""
    kind: str = ""
    seed: int = 0
    dtype: str = ""
    device: str = ""
    p_raw: float | None = None
    tests: int | None = None
    n: int | None = None
    flips: float | None = None
    basis: str | None = None
    mode: str | None = None
    verdict: str = ""
    flags: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    sweep_a: int = 0
    sweep_b: int = 0
    side_a: str = ""
    side_b: str = ""

    @property
    def is_comparable(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        return f"{self.where} {self.metric}"

    @property
    def where(self) -> str:
        """What was compared: the model, the method that is judged, and the cell."""
        return f"{self.model} {self.method_b} {self.cell}"
