"""The survey's claims as a board: one card each, in the survey's own order, decided by this store's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

import pandas as pd
import streamlit as st
from sqlalchemy import select

from harness.claims import BoardRow, Claim, Finding, Outcome, Side, board, counts
from harness.claims.claim import SECTIONS
from harness.plugins import load_claims
from harness.store.store import Store
from harness.store.tables import cells

from .. import page, queries, tables
from ..queries import Stamp

__all__ = ["link_to_rows", "numbers", "render"]

ANY = "any"
_ALL = "all sections"
_DEVICES = (ANY, "cpu", "cuda")
_COLOURS = {Outcome.HOLDS: "blue", Outcome.DOES_NOT_HOLD: "orange", Outcome.NOT_DECIDABLE: "gray"}
_SIGNS = {Outcome.HOLDS: "✓", Outcome.DOES_NOT_HOLD: "✗", Outcome.NOT_DECIDABLE: "?"}
_COMPARED_AT_MOST = 6  # variants that the page Compare takes


def render() -> None:
    """Draw the page."""
    st.title("Survey")
    with page.opened() as store:
        claims = _claims()
        device = page.choose_one("Measured on", _DEVICES, "board", st.sidebar) or ANY
        rows = _board(store.label, queries.stamp(store), None if device == ANY else device, store)
        _draw_counts(rows)
        sections = list(dict.fromkeys(row.claim.section for row in rows))
        section = page.choose_one("Section", [_ALL, *sections], "section")
        outcomes = page.choose_many(
            "Outcome",
            [str(each) for each in Outcome],
            "outcome",
            format_func=lambda each: Outcome(each).words,
        )
        shown = [
            row
            for row in rows
            if section in (_ALL, row.claim.section)
            and (not outcomes or str(row.decision.outcome) in outcomes)
        ]
        if not shown:
            st.info("No claim passes the filters.")
        for name in dict.fromkeys(row.claim.section for row in shown):
            _draw_section(name)
            for row in shown:
                if row.claim.section == name:
                    _draw_card(row, _variants(store, row))
        st.text(
            f"p-values are adjusted over all {len(claims)} claims (Benjamini-Hochberg). "
            "harness reproduce measures what is missing."
        )


def _draw_counts(rows: Sequence[BoardRow]) -> None:
    places = st.columns(3)
    for place, (outcome, number) in zip(places, counts(rows).items(), strict=True):
        place.metric(f"{_SIGNS[outcome]} {outcome.words}", number)


def _draw_section(name: str) -> None:
    if name in SECTIONS:
        st.subheader(name[0].upper() + name[1:])
    else:  # a plugin's own, which may hold marks of Markdown
        st.text(name)


def _draw_card(row: BoardRow, variants: Sequence[int]) -> None:
    """One claim; every text is drawn as text, because plugins and stores wrote them."""
    claim, decision = row.claim, row.decision
    with st.container(border=True, key=f"claim-{claim.id}"):
        outcome = decision.outcome
        st.badge(f"{_SIGNS[outcome]} {outcome.words}", color=_COLOURS[outcome])
        st.text(claim.says)
        st.text(decision.why)
        about = [claim.source, claim.scale and f"here: {claim.scale}", f"claim {claim.id}"]
        if row.device_name:
            about.append(f"measured on {row.device_name}")
        if row.origins:
            about.append(f"imported from {', '.join(row.origins)}")
        st.text(" · ".join(filter(None, about)), width="stretch")
        if decision.findings:
            with st.expander("Numbers"):
                tables.show_table(numbers(decision.findings), f"numbers of {claim.id}")
                if decision.p_adjusted is not None:
                    st.text(f"p = {decision.p:.2g}, {decision.p_adjusted:.2g} adjusted over the board")
        st.link_button("Its rows", link_to_rows(claim, variants))


def numbers(findings: Sequence[Finding]) -> pd.DataFrame:
    """The findings of a claim as a table: one row a figure, what was expected, and what it says."""
    words = {Side.SUPPORTS: "supports", Side.CONTRADICTS: "contradicts", Side.OPEN: "open"}
    return pd.DataFrame(
        {
            "figure": [finding.what for finding in findings],
            "value": [finding.value for finding in findings],
            "lower": [finding.lower for finding in findings],
            "upper": [finding.upper for finding in findings],
            "unit": [finding.unit for finding in findings],
            "claimed": [f"{finding.expected} {finding.bound:.4g}" for finding in findings],
            "says": [words[finding.side] for finding in findings],
            "p": [finding.p if finding.has_spread else None for finding in findings],
            "n": [f"{finding.n} {finding.unit_of_n}" for finding in findings],
            "test": [finding.test for finding in findings],
            "would show": [finding.detectable for finding in findings],
        }
    ).astype({"p": "float64", "would show": "float64"})


def link_to_rows(claim: Claim, variants: Sequence[int]) -> str:
    """Where the rows are: two to six variants side by side, else all of the claim's models and methods.

    The Overview has no path of its own.
    """
    query: Mapping[str, Sequence[str]]
    if 1 < len(variants) <= _COMPARED_AT_MOST:
        query = {"variant": [str(variant) for variant in variants]}
        return f"compare?{urlencode(query, doseq=True)}"
    models = sorted({model for need in claim.sweep for model in need.models})
    methods = sorted({method for need in claim.sweep for method in need.methods} | {"baseline"})
    return f"./?{urlencode({'model': models, 'method': methods}, doseq=True)}"


# --- read once ------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner="Loading the claims …")
def _claims() -> Mapping[str, Claim]:
    return load_claims()


@st.cache_resource(show_spinner=False, max_entries=8)
def _board(label: str, at: Stamp, device: str | None, _store: Store) -> list[BoardRow]:
    # Kept until something is added; Streamlit leaves the parameter with an underscore out of the key.
    return board(_store, _claims().values(), device=device)


def _variants(store: Store, row: BoardRow) -> list[int]:
    """The variants behind a claim's cells, in the order of measuring."""
    if not row.decision.cells:
        return []
    query = select(cells.c.variant_id).where(cells.c.id.in_(row.decision.cells)).distinct()
    with store.reading() as connection:
        return sorted(connection.scalars(query))
