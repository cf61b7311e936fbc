"""The board as Markdown: for `docs/claims.md`, from the rows in `reference/`, and in short for a README."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.claims.board import BoardRow, board, counts, in_words
from harness.claims.claim import Claim
from harness.claims.decision import Finding
from harness.reference_tables import (
    CLAIMS_BEGIN,
    CLAIMS_END,
    markdown_table,
    reference_files,
    with_section,
)

__all__ = ["PAGE", "board_section", "reference_board", "short_board", "update_claims_page"]

PAGE = "docs/claims.md"


def update_claims_page(root: Path) -> None:
    """Write the board into the checkout's page and, in short, into its README, where they have a place.

    Raises:
        ConfigError: a page has half a place for it, or a file in `reference/` is broken.
    """
    page, readme = root / PAGE, root / "README.md"
    if not page.exists():
        return
    rows = reference_board(reference_files(root))
    text = page.read_text(encoding="utf-8")
    page.write_text(with_section(text, board_section(rows), PAGE), encoding="utf-8")
    if readme.exists() and CLAIMS_BEGIN in (text := readme.read_text(encoding="utf-8")):
        markers = (CLAIMS_BEGIN, CLAIMS_END)
        readme.write_text(with_section(text, short_board(rows), markers=markers), encoding="utf-8")


def reference_board(files: Sequence[Path], claims: Iterable[Claim] | None = None) -> list[BoardRow]:
    """The board of all rows in these files; by default of the bundled claims.

    Raises:
        ConfigError: a file is broken.
    """
    from harness.plugins import load_claims
    from harness.store.exchange_import import import_results
    from harness.store.exchange_read import read_results
    from harness.store.store import Store

    wanted = list(load_claims(bundled_only=True).values() if claims is None else claims)
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder, "rows.db")) as store:
        import_results(store, [read_results(file) for file in files])
        return board(store, wanted)


def board_section(rows: Sequence[BoardRow]) -> str:
    """The whole board: how many claims end how, then a table a section."""
    parts = [f"{in_words(counts(rows))}."]
    for section in dict.fromkeys(row.claim.section for row in rows):
        parts.append(f"### {section[0].upper()}{section[1:]}")
        lines = [_line(row) for row in rows if row.claim.section == section]
        parts.append(markdown_table(["claim", "source", "outcome", "numbers", "measured on"], lines))
    return "\n\n".join(parts)


def short_board(rows: Sequence[BoardRow], *, link: str = PAGE) -> str:
    """The board in few columns, for a README; the numbers are behind the link."""
    lines = [[row.claim.says, row.decision.outcome.words] for row in rows]
    table = markdown_table(["claim", "outcome"], lines)
    return f"{table}\n\n{in_words(counts(rows))}; the numbers, sources and tests are in [{link}]({link})."


def _line(row: BoardRow) -> list[str]:
    claim, decision = row.claim, row.decision
    says = f"{claim.says} Here: {claim.scale}." if claim.scale else claim.says
    if decision.findings and decision.is_measured:
        numbers = "; ".join(_finding(each) for each in decision.findings)
        if decision.p_adjusted is not None:
            numbers += f" (p {_p(decision.p_adjusted)})"
    else:
        numbers = decision.why
    return [f"{claim.id}: {says}", claim.source, decision.outcome.words, numbers, row.device_name or "–"]


def _finding(finding: Finding) -> str:
    text = f"{finding.what}: {finding.value:.3g}"
    if finding.has_spread:
        text += f" [{finding.lower:.3g}, {finding.upper:.3g}]"
    return f"{text} {finding.unit}".rstrip() + f", {finding.expected} {finding.bound:.3g} claimed"


def _p(value: float) -> str:
    return "below 0.0001" if value < 1e-4 else f"= {value:.2g}"
