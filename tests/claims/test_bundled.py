"""Every registered claim: its card is complete, what it needs can be swept, and it never raises."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from harness.chain import parse_chain
from harness.claims import SECTIONS, Evidence, Outcome, board, in_order
from harness.claims.running import merged
from harness.config import SweepConfig
from harness.models.loading import resolve_model
from harness.plugins import load_claims, load_plugins
from tests.claims.rows import begin, losses, write

CLAIMS = load_claims(bundled_only=True)
IDS = sorted(CLAIMS)


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


def test_they_are_found_without_importing_the_methods(plugins):
    assert dict(CLAIMS).keys() == {id_ for r in plugins.reports if r.origin == "bundled" for id_ in r.claims}
    assert len(CLAIMS) >= 35


@pytest.mark.parametrize("id_", IDS)
def test_the_card_is_complete(id_, plugins):
    claim = CLAIMS[id_]
    assert claim.section in SECTIONS
    assert (claim.says.endswith(".") and claim.says[0].isupper()) or claim.says[0].isdigit()
    assert re.search(r"\b(19|20)\d\d\b", claim.source), "a source has a year"
    assert claim.scale, "says at which size it is decided"
    assert set(claim.methods) <= set(plugins.methods)


@pytest.mark.parametrize("id_", IDS)
def test_its_grid_is_written_as_tables_show_it(id_, plugins):
    for need in CLAIMS[id_].sweep:
        labels = [parse_chain(method, plugins.methods).label for method in need.methods]
        assert labels == list(need.methods)
        assert need.tasks or need.prompt_lens
        for model in need.models:
            resolve_model(model, plugins.models)
        SweepConfig(models=need.models, methods=need.methods, **need.settings())


@pytest.mark.parametrize("id_", IDS)
def test_without_rows_it_is_not_decidable_and_asks_for_its_own_grid_only(id_):
    claim = CLAIMS[id_]
    asked = []

    class Asked(Evidence):
        def cell(self, model, method, place="transform", seed=0):
            asked.append((model, method, place, seed))
            return super().cell(model, method, place, seed)

    decision = claim.decide(Asked([], lambda _: (), claim.where[0]))
    assert (decision.outcome, decision.is_measured) == (Outcome.NOT_DECIDABLE, False)
    assert asked
    for model, method, place, seed in asked:
        assert any(
            model in need.models
            and method in ("baseline", *need.methods)
            and place in {*need.tasks, *need.scenarios}
            and seed in need.seeds
            for need in claim.sweep
        ), f"{model} · {method} · {place} · {seed} is not in its sweep"


@pytest.mark.parametrize("is_rich", [False, True], ids=["cells without records", "cells of one method"])
def test_partial_rows_make_no_claim_raise(store, is_rich):
    sweep = begin(store)
    for claim in CLAIMS.values():
        need = claim.sweep[0]
        for method in ("baseline", need.methods[-1]) if is_rich else need.methods:
            place = need.tasks[0] if need.tasks else min(need.scenarios)
            records, items = losses(0.1, of=method, count=3) if is_rich else ((), ())
            write(store, sweep, method, place, records, items, model=need.models[0])
    rows = board(store, CLAIMS.values())
    assert [row.claim.id for row in rows] == [claim.id for claim in in_order(CLAIMS.values())]
    assert not [row.decision.why for row in rows if "predicate failed" in row.decision.why]
    assert Outcome.HOLDS not in {row.decision.outcome for row in rows if not is_rich}


def test_all_needs_are_covered_by_few_sweeps_that_measure_nothing_else():
    works = merged(CLAIMS.values())
    wanted = {(m, x) for c in CLAIMS.values() for need in c.sweep for m in need.models for x in need.methods}
    made = {(model, method) for work in works for model in work.models for method in work.methods}
    assert made == wanted
    assert len(works) < sum(len(claim.sweep) for claim in CLAIMS.values())
    nano = [work for work in works if work.models == ("scratch:llama-nano",)]
    assert len(nano) == 1, "one sweep trains all of them"


def test_reading_claims_does_not_import_torch():
    code = (
        "import sys\n"
        "from harness.plugins import load_claims\n"
        "print(len(load_claims(bundled_only=True)), sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [str(len(CLAIMS)), "[]\n"]
