"""All claims against one store: the board. Nothing is run here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.claims.claim import Claim, section_place
from harness.claims.decision import Decision, Outcome, adjusted, undecided
from harness.claims.evidence import Evidence
from harness.claims.reading import read_evidence
from harness.errors import UnknownName
from harness.store.store import Store

__all__ = ["BoardRow", "board", "chosen", "counts", "in_order", "in_words"]


@dataclass(frozen=True)
class BoardRow:
    """A claim and what came of it, and on which device the rows were measured."""

    claim: Claim
    decision: Decision
    device_name: str = ""
    origins: tuple[str, ...] = ()
    """The files that rows behind it were imported from; empty where all were measured here."""


def in_order(claims: Iterable[Claim]) -> list[Claim]:
    """The survey's order: by section, and within one as registered."""
    return sorted(claims, key=lambda claim: section_place(claim.section))


def chosen(claims: Mapping[str, Claim], names: Sequence[str]) -> list[Claim]:
    """The claims of these ids in the survey's order; all of them where none is named.

    Raises:
        UnknownName: there is no such claim (with near matches).
    """
    for name in names:
        if name not in claims:
            raise UnknownName("claim", name, claims)
    return in_order(claims[name] for name in (dict.fromkeys(names) or claims))


def board(store: Store, claims: Iterable[Claim], *, device: str | None = None) -> list[BoardRow]:
    """Every claim with its decision, in the survey's order.

    A claim is decided in the first setting (device, type, versions, origin) that has all the rows that it
    needs: those measured here before imported ones, and the newest first; never across settings, and
    whatever the outcome is there. P-values are adjusted over the whole board, so pass all claims that
    there are and leave out afterwards what is not to be shown.

    Args:
        device: only rows of this kind of device, ``cpu`` or ``cuda``.
    """
    ordered = in_order(claims)
    evidence = [each for each in read_evidence(store, ordered) if device in (None, each.device)]
    rows = [_decided(claim, evidence, device) for claim in ordered]
    decisions = adjusted([row.decision for row in rows])
    return [replace(row, decision=decision) for row, decision in zip(rows, decisions, strict=True)]


def counts(rows: Iterable[BoardRow]) -> dict[Outcome, int]:
    """How many claims ended in each way."""
    found = Counter(row.decision.outcome for row in rows)
    return {outcome: found[outcome] for outcome in Outcome}


def in_words(found: Mapping[Outcome, int]) -> str:
    """How many claims ended in each way.

    >>> in_words({Outcome.HOLDS: 2, Outcome.DOES_NOT_HOLD: 1, Outcome.NOT_DECIDABLE: 0})
    '2 hold, 1 does not hold, 0 are not decidable'
    """
    words = {
        Outcome.HOLDS: ("holds", "hold"),
        Outcome.DOES_NOT_HOLD: ("does not hold", "do not hold"),
        Outcome.NOT_DECIDABLE: ("is not decidable", "are not decidable"),
    }
    return ", ".join(f"{number} {words[outcome][number != 1]}" for outcome, number in found.items())


def _decided(claim: Claim, evidence: Sequence[Evidence], device: str | None) -> BoardRow:
    if device is not None and device not in claim.where:
        return BoardRow(claim, undecided(f"only decidable on {' or '.join(claim.where)}"))
    best: BoardRow | None = None
    for each in evidence:
        if each.device not in claim.where:
            continue
        own = each.narrowed(claim.sweep)
        row = _row(claim, own)
        if row.decision.is_measured:
            return row
        if best is None or len(row.decision.findings) > len(best.decision.findings):
            best = row
    if best is None or not best.decision.findings:
        best = BoardRow(claim, best.decision if best else undecided("not measured", is_measured=False))
    why = f"{best.decision.why}; harness reproduce --claim {claim.id} measures it"
    if device is None and "cpu" not in claim.where:
        why += f" on {' or '.join(claim.where)}"
    return replace(best, decision=replace(best.decision, why=why))


def _row(claim: Claim, evidence: Evidence) -> BoardRow:
    decision = _asked(claim, evidence)
    used = set(decision.cells)
    origins = {cell.origin for cell in evidence.cells if cell.id in used and cell.origin is not None}
    return BoardRow(claim, decision, evidence.device_name, tuple(sorted(origins)))


def _asked(claim: Claim, evidence: Evidence) -> Decision:
    """The claim's decision; a claim that raises is undecided, and the board goes on."""
    if not evidence.cells:
        return undecided("not measured", is_measured=False)
    try:
        decision = claim.decide(evidence)
    except Exception as error:  # the border to code that is not ours
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return undecided(f"its predicate failed ({reason})")
    if not isinstance(decision, Decision):
        return undecided(f"its predicate returned {type(decision).__name__} and no Decision")
    return decision
