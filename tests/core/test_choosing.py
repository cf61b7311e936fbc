"""Which method is taken: by gains and losses as intervals, never by their values alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.choosing import GOALS, Standing, choices, parse_limit, reason
from harness.comparability import Difference
from harness.comparing import Comparison
from harness.errors import ConfigError

SHAPE = "b1-p512-g16"


def timed(method, ratio, *, spread=0.02, metric="decode_latency", cell=SHAPE, **changes):
    row = Comparison(
        "m", cell, metric, "s", 1.0, ratio, ratio=ratio, lower=ratio * (1 - spread),
        upper=ratio * (1 + spread), method_a="baseline", method_b=method, kind="scenario", device="a GPU",
        dtype="bfloat16",
    )  # fmt: skip
    return replace(row, **changes)


def sized(method, ratio):
    return timed(
        method, ratio, metric="weight_bytes", cell="transform", lower=None, upper=None, kind="transform"
    )


def scored(method, difference, *, spread=0.002, metric="acc", task="grammar", unit="fraction", **changes):
    row = Comparison(
        "m", task, metric, unit, 0.8, 0.8 + difference, difference=difference, lower=difference - spread,
        upper=difference + spread, method_a="baseline", method_b=method, kind="task", device="a GPU",
        dtype="bfloat16",
    )  # fmt: skip
    return replace(row, **changes)


def chosen(*rows, goal="decode", most=0.01, **options):
    [choice] = choices(rows, GOALS[goal], most, **options)
    return choice


def standings(choice):
    return {each.method: each.standing for each in choice.candidates}


def test_the_largest_gain_within_the_bound_is_taken():
    choice = chosen(
        timed("fast", 0.4), scored("fast", -0.05),
        timed("good", 0.5), scored("good", -0.004),
        timed("slight", 0.8), scored("slight", 0.001),
    )  # fmt: skip
    assert choice.taken is not None
    assert choice.taken.method == "good"
    assert choice.taken.gain == pytest.approx(2.0)
    assert choice.taken.lower == pytest.approx(1 / (0.5 * 1.02))
    assert standings(choice) == {
        "good": Standing.WITHIN, "slight": Standing.WITHIN, "fast": Standing.BEYOND,
    }  # fmt: skip
    assert [each.method for each in choice.candidates] == ["good", "slight", "fast"]
    assert (choice.model, choice.shape, choice.device) == ("m", SHAPE, "a GPU")


def test_a_loss_that_may_be_either_is_not_taken():
    choice = chosen(timed("new", 0.5), scored("new", -0.009, spread=0.004))
    assert standings(choice) == {"new": Standing.OPEN}
    assert choice.taken is None
    assert chosen(timed("new", 0.5), scored("new", -0.009, spread=0.004), most=0.013).taken is not None


@pytest.mark.parametrize(
    ("row", "standing"),
    [
        (scored("new", 0.5, metric="nll", unit="nats/token"), Standing.BEYOND),  # more is worse
        (scored("new", -0.5, metric="nll", unit="nats/token"), Standing.WITHIN),
        (scored("new", 0.5), Standing.WITHIN),
        (scored("new", -0.5, metric="bleu", unit="points"), Standing.WITHIN),  # of a hundred
        (scored("new", -1.5, metric="bleu", unit="points"), Standing.BEYOND),
    ],
)
def test_what_a_loss_is_follows_from_the_score(row, standing):
    assert standings(chosen(timed("new", 0.5), row)) == {"new": standing}


def test_the_worst_task_counts_and_tasks_can_be_left_out():
    rows = [
        timed("new", 0.5),
        scored("new", 0.0),
        scored("new", 0.3, metric="nll", task="text", unit="nats/token"),
    ]
    assert standings(chosen(*rows)) == {"new": Standing.BEYOND}
    assert standings(chosen(*rows, tasks=["grammar"])) == {"new": Standing.WITHIN}


def test_one_score_leads_a_task():
    rows = [
        scored("new", -0.5, metric="acc_agreement"),  # a part of it
        scored("new", -0.4, metric="acc"),
        scored("new", 0.0, metric="acc_norm"),
        scored("new", -0.3, metric="top1_agreement"),  # no score
        scored("new", -0.3, metric="acc/part"),
        scored("new", 0.9, metric="token_perplexity", unit="ppl", lower=None, upper=None),
    ]
    for order in (rows, rows[::-1]):
        [loss] = chosen(timed("new", 0.5), *order).candidates[0].losses
        assert (loss.metric, loss.value) == ("acc_norm", 0.0)


def test_no_gain_is_no_reason_to_take_a_method():
    choice = chosen(timed("same", 1.0), scored("same", 0.0), timed("slow", 1.5), scored("slow", 0.0))
    assert choice.taken is None
    assert not choice.equal
    assert not any(each.gains for each in choice.candidates)


def test_of_gains_that_cannot_be_told_apart_the_least_loss_is_taken():
    choice = chosen(
        timed("first", 0.495), scored("first", -0.006),
        timed("second", 0.5), scored("second", -0.001),
        timed("third", 0.6), scored("third", 0.0),
    )  # fmt: skip
    assert choice.taken is not None
    assert choice.taken.method == "second"
    assert [each.method for each in choice.equal] == ["first"]


def test_without_any_score_gains_alone_decide_and_with_some_they_do_not():
    choice = chosen(timed("a", 0.5), timed("b", 0.9))
    assert choice.taken is not None
    assert (choice.taken.method, choice.taken.standing) == ("a", Standing.UNJUDGED)
    choice = chosen(timed("a", 0.5), timed("b", 0.9), scored("b", 0.0))
    assert choice.taken is not None
    assert choice.taken.method == "b"
    assert standings(choice)["a"] is Standing.OPEN


def test_bytes_have_no_interval():
    choice = chosen(sized("small", 0.25), scored("small", 0.0), goal="weights")
    assert choice.taken is not None
    assert (choice.taken.gain, choice.taken.lower, choice.taken.upper) == (4.0, 4.0, 4.0)
    assert choice.shape == ""


def test_each_model_and_shape_has_a_choice_of_its_own():
    rows = [
        timed("a", 0.5),
        timed("a", 0.5, cell="b8-p512-g16"),
        timed("a", 0.5, model="other"),
    ]
    assert len(choices(rows, GOALS["decode"], 0.01)) == 3
    assert len(choices(rows, GOALS["decode"], 0.01, shapes=[SHAPE])) == 2
    assert choices(rows, GOALS["prefill"], 0.01) == []


def test_rows_of_other_conditions_do_not_count():
    different = timed("a", 0.1, differences=(Difference("GPU", "x", "y"),))
    assert choices([different], GOALS["decode"], 0.01) == []


def test_seeds_are_candidates_of_their_own():
    choice = chosen(timed("a", 0.5, seed=0), timed("a", 0.7, seed=1), scored("a", 0.0, seed=1))
    assert {(each.seed, each.standing) for each in choice.candidates} == {
        (0, Standing.OPEN), (1, Standing.WITHIN),
    }  # fmt: skip


def test_why_names_the_source_of_a_gain_and_the_sentences_about_it():
    verdict = "Prefill takes 1.2x the baseline's time: a. b. Decode takes 1.1x the baseline's time: c."
    records = {"compression_ratio": {"value": 3.466}, "decode_mbu": {"value": 0.42}}
    assert reason(GOALS["decode"], verdict, records) == (
        "weights 3.47x smaller, 42% of the memory's ceiling. Decode takes 1.1x the baseline's time: c."
    )
    assert reason(GOALS["prefill"], verdict, {}) == "Prefill takes 1.2x the baseline's time: a. b."
    assert reason(GOALS["weights"], "smaller than the baseline", {}) == ""
    assert reason(GOALS["weights"], "", {"stored_bits_per_weight": {"value": None}}) == "", "no number"


def test_whys_belong_to_their_cells():
    whys = {
        ("m", "a", 0, SHAPE, "bfloat16", "a GPU"): "because",
        ("m", "a", 0, SHAPE, "float32", "a GPU"): "no",
    }
    assert chosen(timed("a", 0.5), whys=whys).candidates[0].why == "because"
    for other in ({"dtype": "float16"}, {"device": "a CPU"}):
        assert chosen(timed("a", 0.5, **other), whys=whys).candidates[0].why == ""


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1%%", "%"])
def test_a_limit_is_a_number(text):
    with pytest.raises(ConfigError, match=r"write how much may be lost, such as 0\.01 or 1%"):
        parse_limit(text)


def test_a_method_without_a_score_in_a_task_of_the_others_is_not_taken():
    rows = [
        timed("fast", 0.4), scored("fast", 0.0),  # its cell of hellaswag failed
        timed("good", 0.5), scored("good", 0.0), scored("good", 0.0, task="hellaswag"),
        timed("bad", 0.3), scored("bad", -0.5),
    ]  # fmt: skip
    choice = chosen(*rows)
    assert choice.taken is not None
    assert choice.taken.method == "good"
    assert standings(choice) == {
        "good": Standing.WITHIN, "fast": Standing.OPEN, "bad": Standing.BEYOND,
    }  # fmt: skip
    assert {each.method: each.unscored for each in choice.candidates} == {
        "good": (), "fast": ("hellaswag",), "bad": ("hellaswag",),
    }  # fmt: skip
    choice = chosen(*rows, tasks=["grammar"])
    assert choice.taken is not None
    assert choice.taken.method == "fast"


def test_tasks_of_another_dtype_are_not_asked_for():
    choice, other = choices(
        [
            timed("a", 0.5), scored("a", 0.0),
            timed("a", 0.5, dtype="float32"), scored("a", 0.0, dtype="float32"),
            scored("a", 0.0, dtype="float32", task="hellaswag"),
        ],
        GOALS["decode"], 0.01,
    )  # fmt: skip
    assert choice.taken is not None
    assert other.taken is not None
