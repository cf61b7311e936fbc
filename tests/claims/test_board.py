"""Which rows decide a claim, what keeps them from it, and claims that misbehave."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from harness.claims import Evidence, Incomparable, Outcome, SweepNeed, board, chosen, counts, loses_less
from harness.claims.reading import read_evidence
from harness.comparability import Scope
from harness.errors import ConfigError, UnknownName
from harness.records import Record, Status
from harness.store.exchange_export import Wanted, export_results
from harness.store.exchange_import import import_results
from harness.store.exchange_read import read_results
from harness.store.store import Store
from tests.claims.rows import MODEL, begin, claim, scored, timed, write

HOLDS, FAILS, OPEN = Outcome.HOLDS, Outcome.DOES_NOT_HOLD, Outcome.NOT_DECIDABLE
BETTER = loses_less("good", than="bad", model=MODEL, task="text")


def only(store, *claims, **about):
    [row] = board(store, claims or [claim(BETTER)], **about)
    return row


def pair(store, sweep, gain=0.1, **about):
    scored(store, sweep, "good", 1 - gain, **about)
    scored(store, sweep, "bad", 1.0, **about)


# --- rows that are missing ----------------------------------------------------------------------------


def test_an_empty_store_says_how_to_measure(store):
    decision = only(store).decision
    assert (decision.outcome, decision.is_measured) == (OPEN, False)
    assert decision.why == "not measured; harness reproduce --claim a-claim measures it"


def test_what_is_missing_is_named(store):
    scored(store, begin(store), "good", 0.1)
    decision = only(store).decision
    assert "not measured: zoo:m · bad · text; harness reproduce --claim a-claim measures it" in decision.why
    assert not decision.is_measured


def test_a_cell_that_failed_says_why(store):
    sweep = begin(store)
    scored(store, sweep, "good", 0.1)
    write(store, sweep, "bad", "text", status=Status.OOM, reason="out of memory")
    decision = only(store).decision
    assert (decision.outcome, decision.why) == (OPEN, "zoo:m · bad · text: oom (out of memory)")


def test_a_record_that_is_missing_says_so(store):
    sweep = begin(store)
    scored(store, sweep, "good", 0.1)
    write(store, sweep, "bad", "text", [Record("acc", 0.5, "fraction")])
    assert only(store).decision.why.startswith("zoo:m · bad · text: it has no nll")


# --- rows that do not count ---------------------------------------------------------------------------


def test_a_limit_counts_only_where_the_claim_allows_it(store):
    pair(store, begin(store, config={"limit": 10}))
    assert "not measured" in only(store).decision.why
    for limit, outcome in ((10, HOLDS), (20, OPEN)):
        need = SweepNeed((MODEL,), ("good", "bad"), ("text",), limit=limit)
        assert only(store, claim(BETTER, need=need)).decision.outcome is outcome


def trained(store, steps):
    budget = {"training": {"steps": steps, "batch_size": 8, "len": 64, "text": "0123456789"}}
    sweep = begin(store, workload={"budget": budget})
    pair(store, sweep)
    for method in ("good", "bad"):
        write(store, sweep, method, "b1-p64-g16", [Record("trained_tokens", 512.0, "tokens")])


@pytest.mark.parametrize(("steps", "outcome"), [(100, HOLDS), (50, OPEN)])
def test_rows_of_another_training_budget_do_not_count(store, steps, outcome):
    trained(store, steps)
    need = SweepNeed((MODEL,), ("good", "bad"), ("text",), train_steps=100, train_batch_size=8, train_len=64)
    assert only(store, claim(BETTER, need=need)).decision.outcome is outcome


@pytest.mark.parametrize(
    ("kind", "name", "default", "tokens"),
    [("calibration", "samples", 128, "calibration_tokens"), ("training", "steps", 100, "trained_tokens")],
)
def test_rows_of_another_budget_than_a_sweeps_own_do_not_count(store, kind, name, default, tokens):
    whole = {"samples": 128} if kind == "calibration" else {"steps": 100, "batch_size": 8, "len": 128}
    for spent, gain in ((default, 0.5), (1, -0.5)):  # the newer rows say the opposite
        sweep = begin(store, workload={"budget": {kind: {**whole, name: spent}}})
        pair(store, sweep, gain)
        for method in ("good", "bad"):
            write(store, sweep, method, "b1-p64-g16", [Record(tokens, 512.0, "tokens")])
    assert only(store).decision.outcome is HOLDS
    asked = {"calibration": "calibration_samples", "training": "train_steps"}[kind]
    need = SweepNeed((MODEL,), ("good", "bad"), ("text",), **{asked: 1})
    assert only(store, claim(BETTER, need=need)).decision.outcome is FAILS


def test_rows_outside_of_the_grid_do_not_count(store):
    pair(store, begin(store))
    need = SweepNeed((MODEL,), ("good",), ("text",))
    assert "not measured: zoo:m · bad" in only(store, claim(BETTER, need=need)).decision.why


def test_rows_of_different_settings_do_not_stand_side_by_side(store):
    scored(store, begin(store), "good", 0.1)
    scored(store, begin(store, device_name="another CPU"), "bad", 1.0, device_name="another CPU")
    scored(store, begin(store, versions={"torch": "2.14"}), "bad", 1.0)
    assert not only(store).decision.is_measured


def test_rows_of_other_task_data_are_refused(store):
    for method, revision in (("good", "one"), ("bad", "two")):
        scored(store, begin(store, workload={"tasks": {"text": revision}}), method, 0.1)
    decision = only(store).decision
    assert decision.outcome is OPEN
    assert "differ in task data: two and one" in decision.why


def test_the_newest_row_counts_and_a_failure_does_not_hide_an_ok_one(store):
    pair(store, begin(store), gain=-0.5)
    pair(store, begin(store), gain=0.5)
    newest = begin(store)
    write(store, newest, "good", "text", status=Status.TIMEOUT, reason="too slow")
    decision = only(store).decision
    assert decision.outcome is HOLDS
    assert decision.findings[0].value == pytest.approx(0.5, abs=0.02)


# --- devices and origins ------------------------------------------------------------------------------


def exported(tmp_path, empty_store, gain):
    other = tmp_path / "other.db"
    shutil.copy(empty_store, other)
    with Store.open(other) as store:
        sweep = begin(store)
        pair(store, sweep, gain)
        store.close_sweep(sweep, "finished")
        export_results(store, tmp_path / "rows.jsonl.gz", Wanted(), leave_out=["samples", "kernels"])
    return tmp_path / "rows.jsonl.gz"


def test_imported_rows_decide_where_there_are_no_others(store, tmp_path, empty_store):
    import_results(store, [read_results(exported(tmp_path, empty_store, 0.3))])
    row = only(store)
    assert (row.decision.outcome, row.device_name) == (HOLDS, "a CPU")
    assert row.origins == ("rows.jsonl.gz",)
    pair(store, begin(store), gain=-0.3)
    own = only(store)
    assert (own.decision.outcome, own.origins) == (Outcome.DOES_NOT_HOLD, ()), (
        "what was measured here is first"
    )


def test_a_claim_of_another_device_is_not_decidable_here(store):
    sweep = begin(store, device="cuda", device_name="a GPU")
    pair(store, sweep, device="cuda", device_name="a GPU")
    on_gpu = claim(BETTER, where=("cuda",))
    assert only(store, on_gpu, device="cpu").decision.why == "only decidable on cuda"
    assert only(store, on_gpu).decision.outcome is HOLDS
    assert only(store, on_gpu, device="cuda").device_name == "a GPU"
    assert not only(store, claim(BETTER, where=("cpu",))).decision.is_measured


def test_times_of_two_files_are_not_compared(store):
    sweep = begin(store)
    cells = [timed(store, sweep, method, prefill=(2.0, 1.9, 2.1)) for method in ("good", "bad")]
    [evidence] = read_evidence(store, [claim(BETTER)])
    good, bad = (evidence.cell(MODEL, method, "b1-p64-g16") for method in ("good", "bad"))
    assert [good.id, bad.id] == cells
    evidence.require_comparable([good, bad], Scope.TIMING)
    with pytest.raises(Incomparable, match="were timed in None and a file"):
        Evidence.require_comparable(evidence, [good, replace(bad, origin="a file")], Scope.TIMING)


# --- claims that misbehave ----------------------------------------------------------------------------


def test_a_claim_that_raises_leaves_the_others_alone(store):
    pair(store, begin(store))

    def explode(evidence):
        raise ZeroDivisionError("of nothing")

    wrong = claim(id="wrong", decide=lambda evidence: "yes")
    rows = board(store, [claim(id="hostile", decide=explode), wrong, claim(BETTER, id="fine")])
    by_id = {row.claim.id: row.decision for row in rows}
    assert by_id["hostile"].why == "its predicate failed (ZeroDivisionError: of nothing)"
    assert by_id["wrong"].why == "its predicate returned str and no Decision"
    assert by_id["fine"].outcome is HOLDS
    assert counts(rows) == {HOLDS: 1, Outcome.DOES_NOT_HOLD: 0, OPEN: 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "Not An Id"}, "an id is lower-case words"),
        ({"says": " "}, "says is empty"),
        ({"methods": ()}, "methods is empty"),
        ({"where": ("tpu",)}, "where must be some of cpu, cuda, not tpu"),
    ],
)
def test_an_incomplete_claim_is_refused(changes, message):
    need = SweepNeed((MODEL,), ("good",), ("text",))
    with pytest.raises(ConfigError, match=message):
        claim(BETTER, need=need, **changes)


def test_claims_stand_in_the_surveys_order_and_unknown_ones_have_near_matches():
    sections = {"one": "zebra", "two": "hardware", "three": "distillation", "four": "alpaca"}
    by_id = {name: claim(BETTER, id=name, section=section) for name, section in sections.items()}
    assert [each.id for each in chosen(by_id, ())] == ["three", "two", "four", "one"]
    assert [each.id for each in chosen(by_id, ("one", "two"))] == ["two", "one"]
    with pytest.raises(UnknownName, match="unknown claim 'thre'; did you mean 'three'"):
        chosen(by_id, ("thre",))
