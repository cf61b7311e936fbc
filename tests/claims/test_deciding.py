"""Every kind of part on hand-made rows in all three outcomes, and the rule that joins them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from harness.claims import (
    Decision,
    Finding,
    Outcome,
    Side,
    board,
    concluded,
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
    undecided,
)
from harness.claims.decision import adjusted
from harness.records import Item, Record
from tests.claims.rows import MODEL, OTHER, SHAPE, begin, claim, scored, timed, write

HOLDS, FAILS, OPEN = Outcome.HOLDS, Outcome.DOES_NOT_HOLD, Outcome.NOT_DECIDABLE


def decided(store, *parts, **changes) -> Decision:
    [row] = board(store, [claim(*parts, **changes)])
    return row.decision


# --- losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rise", "outcome"), [(-0.1, HOLDS), (0.1, FAILS), (0.0005, OPEN)])
def test_which_of_two_loses_less(store, rise, outcome):
    sweep = begin(store)
    cells = scored(store, sweep, "good", rise), scored(store, sweep, "bad", 0.0)
    decision = decided(store, loses_less("good", than="bad", model=MODEL, task="text"))
    assert decision.outcome is outcome
    [finding] = decision.findings
    assert finding.lower < finding.value < finding.upper
    assert (finding.n, finding.unit_of_n, finding.unit) == (30, "windows", "nats/token")
    assert decision.cells == cells
    if outcome is OPEN:
        assert "would show" in decision.why
        assert finding.detectable > abs(finding.value)


def test_a_lead_smaller_than_was_claimed_does_not_hold(store):
    sweep = begin(store)
    scored(store, sweep, "good", 0.0)
    scored(store, sweep, "bad", 0.1)
    assert decided(store, loses_less("good", than="bad", model=MODEL, task="text", by=0.05)).outcome is HOLDS
    assert decided(store, loses_less("good", than="bad", model=MODEL, task="text", by=0.2)).outcome is FAILS


def test_methods_of_two_models_are_compared_on_the_same_items(store):
    sweep = begin(store)
    scored(store, sweep, "good", 0.0)
    scored(store, sweep, "good", 0.2, model=OTHER)
    scored(store, sweep, "bad", -0.2)
    scored(store, sweep, "bad", 0.1, model=OTHER)
    part = loses_less("good", than="bad", model=MODEL, than_model=OTHER, task="text")
    decision = decided(store, part, models=(MODEL, OTHER))
    assert decision.outcome is HOLDS
    assert f"{OTHER} · bad loses more than {MODEL} · good by" in decision.why


@pytest.mark.parametrize(("rise", "outcome"), [(0.0, HOLDS), (0.1, FAILS), (0.02, OPEN)])
def test_almost_nothing_is_a_number(store, rise, outcome):
    sweep = begin(store)
    scored(store, sweep, "baseline", 0.0)
    scored(store, sweep, "good", rise, noise=0.03)
    assert decided(store, loses_at_most("good", 0.02, model=MODEL, task="text")).outcome is outcome


@pytest.mark.parametrize(("left", "outcome"), [(0.02, HOLDS), (0.2, FAILS), (0.1, OPEN)])
def test_repairing_a_share_of_the_damage(store, left, outcome):
    sweep = begin(store)
    for method, rise in (("baseline", 0.0), ("bad", 0.5), ("good", left)):
        scored(store, sweep, method, rise, noise=0.03)
    decision = decided(store, repairs("good", "bad", model=MODEL, task="text", share=0.8))
    assert decision.outcome is outcome
    assert decision.findings[0].value == pytest.approx(0.1 - left, abs=0.02)


@pytest.mark.parametrize(("here", "outcome"), [(0.3, HOLDS), (0.0, FAILS), (0.1, OPEN)])
def test_an_advantage_that_is_larger_on_another_model(store, here, outcome):
    sweep = begin(store)
    for model, gain in ((MODEL, here), (OTHER, 0.1)):
        scored(store, sweep, "good", 1.0 - gain, model=model)
        scored(store, sweep, "bad", 1.0, model=model)
    part = gains_more("good", "bad", model=MODEL, reference=OTHER, task="text")
    assert decided(store, part, models=(MODEL, OTHER)).outcome is outcome


def test_accuracy_counts_the_other_way_round(store):
    sweep = begin(store)
    for method, right in (("good", 0.9), ("bad", 0.6), ("baseline", 1.0)):
        items = [Item(index, "acc", float(index % 10 < right * 10)) for index in range(200)]
        write(store, sweep, method, "text", [Record("acc", right, "fraction", n=200)], items)
    decision = decided(store, loses_less("good", than="bad", model=MODEL, task="text", metric="acc"))
    assert (decision.outcome, decision.findings[0].unit_of_n) == (HOLDS, "items")
    assert decision.findings[0].value == pytest.approx(0.3)
    most = loses_at_most("good", 0.05, model=MODEL, task="text", metric="acc")
    assert decided(store, most).findings[0].value == pytest.approx(0.1)


def test_outcomes_that_are_equal_item_by_item_are_no_effect(store):
    sweep = begin(store)
    scored(store, sweep, "good", 0.1, noise=0)
    scored(store, sweep, "bad", 0.1, noise=0)
    decision = decided(store, loses_less("good", than="bad", model=MODEL, task="text"))
    assert (decision.outcome, decision.findings[0].value) == (FAILS, 0)
    assert decided(store, loses_at_most("good", 0.01, model=MODEL, task="text", than="bad")).outcome is HOLDS


def seeded(store, gains):
    sweep = begin(store)
    for seed, gain in enumerate(gains):
        scored(store, sweep, "good", 1.0 - gain, seed=seed, noise=0.001)
        scored(store, sweep, "bad", 1.0, seed=seed, noise=0.001)
    return decided(store, loses_less("good", than="bad", model=MODEL, task="text", seeds=range(len(gains))))


def test_seeds_that_disagree_decide_nothing_however_many_items_there_are(store):
    decision = seeded(store, (0.5, 0.02, 0.1))
    assert decision.outcome is OPEN
    assert "t over 3 seeds" in decision.findings[0].test
    assert decision.findings[0].lower < 0


def test_seeds_that_agree_decide_it(store):
    decision = seeded(store, (0.30, 0.31, 0.29))
    assert decision.outcome is HOLDS
    assert decision.findings[0].value == pytest.approx(0.3, abs=0.01)
    assert decision.p > 1e-4, "three seeds are never as sure as thirty windows"


# --- without items ------------------------------------------------------------------------------------


def _rise(value, half):
    return [
        Record("nll", 3 + value, "nats/token", n=30),
        Record("nll_rise", value, "nats/token", value - half, value + half, 30),
    ]


@pytest.mark.parametrize(("value", "outcome"), [(0.1, HOLDS), (0.5, FAILS), (0.29, OPEN)])
def test_stored_differences_decide_where_items_were_not_kept(store, value, outcome):
    sweep = begin(store)
    write(store, sweep, "baseline", "text", [Record("nll", 3.0, "nats/token", n=30)])
    write(store, sweep, "good", "text", _rise(value, 0.02))
    write(store, sweep, "bad", "text", _rise(0.3, 0.03))
    decision = decided(store, loses_less("good", than="bad", model=MODEL, task="text"))
    assert decision.outcome is outcome
    [finding] = decision.findings
    assert finding.upper - finding.value == pytest.approx(math.hypot(0.02, 0.03))
    assert finding.note == "combined as if independent"


def test_across_models_stored_differences_say_nothing(store):
    sweep = begin(store)
    for model in (MODEL, OTHER):
        for method in ("good", "bad"):
            write(store, sweep, method, "text", _rise(0.1, 0.01), model=model)
    part = gains_more("good", "bad", model=MODEL, reference=OTHER, task="text")
    decision = decided(store, part, models=(MODEL, OTHER))
    assert (decision.outcome, decision.is_measured) == (OPEN, True)
    assert "items were not kept" in decision.why


# --- times and sizes ----------------------------------------------------------------------------------

RATIOS = [((1.5, 1.45, 1.55), 1), ((0.7, 0.68, 0.72), -1), ((1.0, 0.9, 1.1), 0)]


@pytest.mark.parametrize(("numbers", "sign"), RATIOS)
def test_faster_and_slower(store, numbers, sign):
    timed(store, begin(store), "good", prefill=numbers)
    where = {"model": MODEL, "scenario": SHAPE, "phase": "prefill"}
    outcomes = {1: HOLDS, -1: FAILS, 0: OPEN}
    assert decided(store, faster("good", **where)).outcome is outcomes[sign]
    assert decided(store, slower("good", **where)).outcome is outcomes[-sign]


def test_no_faster_needs_an_interval_below_the_margin(store):
    timed(
        store,
        begin(store),
        "good",
        prefill=(1.0, 0.98, 1.02),
        decode=(1.0, 0.9, 1.1),
        end_to_end=(2, 1.9, 2.1),
    )
    where = {"model": MODEL, "scenario": SHAPE}
    assert decided(store, no_faster("good", phase="prefill", **where)).outcome is HOLDS
    assert decided(store, no_faster("good", phase="decode", **where)).outcome is OPEN
    assert decided(store, no_faster("good", phase="end_to_end", **where)).outcome is FAILS


def test_few_rounds_are_never_surer_than_their_signs(store):
    record = Record("prefill_speedup", 2.0, "x", 1.99, 2.01, 4)
    timed(store, begin(store), "good", more=[record])
    decision = decided(store, faster("good", model=MODEL, scenario=SHAPE, phase="prefill"))
    assert (decision.findings[0].p, decision.outcome) == (2 * 0.5**4, OPEN)


def test_two_methods_are_compared_by_their_rounds_with_the_baseline(store):
    sweep = begin(store)
    timed(store, sweep, "good", prefill=(2.0, 1.9, 2.1))
    timed(store, sweep, "bad", prefill=(1.2, 1.15, 1.25))
    part = faster("good", over="bad", model=MODEL, scenario=SHAPE, phase="prefill", by=1.5)
    decision = decided(store, part)
    assert decision.findings[0].value == pytest.approx(2.0 / 1.2)
    assert decision.outcome is HOLDS


def lengths(store, method, exponent, half=0.01):
    sweep = begin(store)
    for prompt in (64, 128, 256):
        seconds = 1e-3 * (prompt / 64) ** exponent
        records = [
            Record("prefill_latency", seconds, "s", seconds * (1 - half), seconds * (1 + half), 20),
            Record("control_latency", 1e-3, "s", 1e-3 * (1 - half), 1e-3 * (1 + half), 20),
        ]
        write(store, sweep, method, f"b1-p{prompt}-g16", records)


@pytest.mark.parametrize(("exponent", "outcome"), [(1.5, HOLDS), (0.7, FAILS), (1.0, OPEN)])
def test_exponents_over_lengths(store, exponent, outcome):
    lengths(store, "baseline", exponent)
    where = {"model": MODEL, "prompts": (64, 128, 256)}
    decision = decided(store, exponent_above(1.0, **where))
    assert decision.outcome is outcome
    assert decision.findings[0].value == pytest.approx(exponent)
    opposite = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[outcome]
    assert decided(store, exponent_below(1.0, **where)).outcome is opposite


@pytest.mark.parametrize(("exponent", "outcome"), [(1.0, HOLDS), (2.0, FAILS), (1.5, OPEN)])
def test_one_exponent_against_another(store, exponent, outcome):
    lengths(store, "bad", 1.5)
    lengths(store, "good", exponent)
    part = exponent_lower("good", than="bad", model=MODEL, prompts=(64, 128, 256))
    assert decided(store, part).outcome is outcome


def test_a_busy_machine_is_taken_out_by_the_control(store):
    sweep = begin(store)
    for prompt, busy in ((64, 1), (128, 3), (256, 1)):
        records = [
            Record(
                "prefill_latency",
                busy * prompt * 1e-5,
                "s",
                busy * prompt * 0.99e-5,
                busy * prompt * 1.01e-5,
                9,
            ),
            Record("control_latency", busy * 1e-3, "s", busy * 0.99e-3, busy * 1.01e-3, 9),
        ]
        write(store, sweep, "baseline", f"b1-p{prompt}-g16", records)
    decision = decided(store, exponent_below(1.2, model=MODEL, prompts=(64, 128, 256)))
    assert decision.findings[0].value == pytest.approx(1.0)


@pytest.mark.parametrize(("bytes_", "outcome"), [(128, HOLDS), (256, FAILS)])
def test_bytes_have_no_spread(store, bytes_, outcome):
    sweep = begin(store)
    for method, value in (("baseline", 1024), ("good", bytes_)):
        write(store, sweep, method, SHAPE, [Record("kv_cache_bytes_per_token", value, "B/token")])
    part = times_smaller("kv_cache_bytes_per_token", 8, model=MODEL, method="good", place=SHAPE)
    decision = decided(store, part)
    assert (decision.outcome, decision.p, decision.findings[0].test) == (outcome, None, "exact")
    assert decision.findings[0].value == 1024 / bytes_


# --- the rule -----------------------------------------------------------------------------------------


def finding(value, *, half=0.1, p=0.001, **changes):
    about = ("a figure", value, value - half, value + half, "x", Side.ABOVE, 0.0, "a test", 9, "items", p)
    return replace(Finding(*about), **changes)


def test_all_parts_have_to_support():
    decision = concluded([finding(1, p=0.001), finding(2, p=0.03)])
    assert (decision.outcome, decision.p) == (HOLDS, 0.03)
    assert concluded([finding(1), finding(0.05, p=0.4)]).outcome is OPEN


def test_an_interval_beside_the_bound_is_not_enough_where_the_test_disagrees():
    assert concluded([finding(1, p=0.06)]).outcome is OPEN


def test_one_part_against_it_is_enough_and_pays_for_being_one_of_many():
    decision = concluded([finding(1), finding(-1, p=0.002), finding(2)])
    assert (decision.outcome, decision.p) == (FAILS, pytest.approx(0.006))
    assert "where above 0 was claimed" in decision.why
    weak = concluded([finding(1), finding(-1, p=0.02), finding(2)])
    assert (weak.outcome, weak.p) == (OPEN, pytest.approx(0.06))


@pytest.mark.parametrize("expected", [Side.ABOVE, Side.BELOW])
@pytest.mark.parametrize("broken", ["value", "lower", "upper", "p"])
def test_a_figure_that_is_no_number_decides_nothing(expected, broken):
    changed = finding(1, expected=expected, **({"p": math.nan} if broken == "p" else {}))
    changed = changed if broken == "p" else replace(changed, **{broken: math.nan})
    decision = concluded([changed])
    assert (decision.outcome, decision.p) == (OPEN, None)
    assert "says nothing" in decision.why
    unspread = replace(changed, value=math.nan, p=None)
    assert concluded([unspread]).outcome is OPEN
    assert concluded([finding(-1, p=0.001), changed]).outcome is FAILS  # one part against it is enough


def test_a_claim_without_findings_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        concluded([])


def test_p_values_are_adjusted_over_the_board():
    alone = concluded([finding(1, p=0.04)])
    assert adjusted([alone])[0].outcome is HOLDS
    others = [concluded([finding(0.05, p=0.5)]) for _ in range(9)]
    [first, *_] = adjusted([alone, *others, undecided("not measured")])
    assert (first.outcome, first.p_adjusted) == (OPEN, pytest.approx(0.4))
    assert "among 10 claims" in first.why
