"""``harness choose``: an answer in one line, with what it rests on; and what cannot be answered."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from harness.cli.app import run
from harness.comparing import sides
from harness.records import Record
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep, around, items, timed

SHAPE = "b1-p8-g2"


@pytest.fixture
def path(tmp_path):
    """`good` is twice as fast and right as often, `bad` four times as fast and wrong, `slow` slower."""
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for method, seconds, wrong in (
            ("baseline", 2.0, 0), ("good", 1.0, 0), ("bad", 0.5, 100), ("slow", 4.0, 0),
        ):  # fmt: skip
            records = timed("decode_latency", around(seconds)), timed("prefill_latency", around(2.0))
            add_cell(store, sweep, method, *records, scenario=SHAPE)
            outcomes = [0] * wrong + [1] * (400 - wrong)
            accuracy = Record("acc", sum(outcomes) / 400, "fraction", n=400)
            add_cell(store, sweep, method, accuracy, task="grammar", items=items(outcomes))
    return str(tmp_path / "results.db")


def test_the_answer_is_one_line(path, capsys):
    assert run(["choose", "--db", path]) == 0
    shown = capsys.readouterr()
    answer = shown.out.strip().splitlines()[-1]
    assert answer.startswith(f"m at {SHAPE} on a GPU: take good: decoding 2x [")
    assert "faster, which loses grammar" in answer
    assert "bad is 4x [" in answer
    assert "but loses too much" in answer
    assert "no gain" in shown.out, "slow is listed too"


def test_the_store_is_read_once_however_many_methods_it_has(path, monkeypatch):
    reads = []
    read = sides.all_cells
    monkeypatch.setattr(sides, "all_cells", lambda *given: reads.append(given) or read(*given))
    assert run(["choose", "--db", path]) == 0
    assert run(["compare", "baseline", "--all", "--db", path]) == 0
    assert len(reads) == 2


def test_more_may_be_lost(path, capsys):
    assert run(["choose", "--db", path, "--lose", "50%"]) == 0
    assert "take bad: decoding 4x [" in capsys.readouterr().out.splitlines()[-1]


def test_weights_are_chosen_by_where_nothing_was_timed(tmp_path, capsys):
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for method, weights in (("baseline", 8.0), ("small", 2.0)):
            add_cell(store, sweep, method, Record("weight_bytes", weights, "B"))
            scored = Record("acc", 1.0, "fraction", n=400)
            add_cell(store, sweep, method, scored, task="grammar", items=items([1] * 400))
    assert run(["choose", "--for", "weights", "--db", str(tmp_path / "results.db")]) == 0
    answer = capsys.readouterr().out.strip().splitlines()[-1]
    assert "take small: the weights 4x smaller" in answer


def test_the_reason_is_that_of_the_same_type_and_device(tmp_path, capsys):
    with Store.open(tmp_path / "results.db") as store:
        sweep = add_sweep(store)
        for dtype, bits in (("bfloat16", 4.0), ("float32", 8.0)):
            for method, held in (("baseline", 16.0), ("small", bits)):
                records = Record("weight_bytes", held, "B"), Record("stored_bits_per_weight", held, "bit")
                add_cell(store, sweep, method, *records, dtype=dtype)
                shape = timed("decode_latency", around(2.0)), Record("weight_bytes", held, "B")
                add_cell(store, sweep, method, *shape, scenario=SHAPE, dtype=dtype)
    arguments = ["choose", "--for", "weights", "--db", str(tmp_path / "results.db"), "--format", "json"]
    assert run(arguments) == 0
    chosen = {each["dtype"]: each["taken"]["why"] for each in json.loads(capsys.readouterr().out)}
    assert chosen == {"bfloat16": "4 bits a weight.", "float32": "8 bits a weight."}


def test_nothing_better_keeps_the_baseline(path, capsys):
    assert run(["choose", "--db", path, "--for", "prefill"]) == 0
    answer = capsys.readouterr().out.splitlines()[-1]
    assert "keep the baseline: no method is faster at a loss of at most 1%" in answer


def test_programs_read_json_alone(path, capsys):
    assert run(["choose", "--db", path, "--format", "json"]) == 0
    shown = capsys.readouterr()
    [choice] = json.loads(shown.out)
    assert choice["taken"]["method"] == "good"
    assert choice["taken"]["losses"][0]["task"] == "grammar"
    assert {each["method"]: each["standing"] for each in choice["candidates"]} == {
        "good": "within", "bad": "beyond", "slow": "within",
    }  # fmt: skip
    assert "take good" in shown.err


@pytest.mark.parametrize("output", ["csv", "markdown"])
def test_other_formats_list_the_candidates(path, capsys, output):
    assert run(["choose", "--db", path, "--format", output, "--at", SHAPE, "--tasks", "grammar"]) == 0
    assert "as" not in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--for", "decoding"], "unknown goal 'decoding'; did you mean 'decode'?"),
        (["--lose", "much"], "write how much may be lost, such as 0.01 or 1%"),
        (["--tasks", "gramar"], "unknown task in this store: 'gramar'; did you mean 'grammar'?"),
        (["--at", "b9"], "unknown shape in this store: 'b9'"),
        (["--for", "energy"], "no method's decode_energy was compared with the baseline's"),
        (["--models", "other"], "unknown model in this store: 'other'"),
        (["--tasks", ""], "an option names no task; leave it out for all of them"),
        (["--at", ","], "an option names no shape; leave it out for all of them"),
    ],
)
def test_what_cannot_be_answered_is_one_line(path, capsys, arguments, says):
    assert run(["choose", "--db", path, *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_store_of_baselines_alone(tmp_path, capsys):
    with Store.open(tmp_path / "results.db") as store:
        latency = timed("decode_latency", around(1.0))
        add_cell(store, add_sweep(store), "baseline", latency, scenario=SHAPE)
    assert run(["choose", "--db", str(tmp_path / "results.db")]) == 2
    assert "nothing was measured beside the baseline: sweep some methods first" in capsys.readouterr().err


def test_what_has_no_score_in_a_task_is_said(path, capsys):
    with Store.open(path) as store:
        sweep = add_sweep(store)
        for method in ("baseline", "slow"):
            right = Record("acc", 1.0, "fraction", n=400)
            add_cell(store, sweep, method, right, task="hellaswag", items=items([1] * 400))
    assert run(["choose", "--db", path]) == 0
    shown = capsys.readouterr().out
    assert "hellaswag unknown" in shown
    answer = shown.strip().splitlines()[-1]
    assert "keep the baseline" in answer
    assert "but loses too much" in answer
    assert run(["choose", "--db", path, "--tasks", "grammar"]) == 0
    assert "take good" in capsys.readouterr().out


def test_a_method_on_a_model_without_a_baseline_hides_no_answer(path, capsys):
    with Store.open(path) as store:
        latency = timed("decode_latency", around(1.0))
        add_cell(store, add_sweep(store), "elsewhere", latency, scenario=SHAPE, model="n")
    assert run(["choose", "--db", path]) == 0
    assert "take good" in capsys.readouterr().out


def add_settings(store, *more):
    """One method on two devices and in two types, each with a verdict of its own, and these records."""
    sweep = add_sweep(store)
    for device in ("a GPU", "a CPU"):
        for dtype, seconds in (("bfloat16", 1.0), ("float32", 3.0)):
            setting = {"device_name": device, "dtype": dtype}
            add_cell(
                store, sweep, "baseline", timed("decode_latency", around(2.0)), scenario=SHAPE, **setting
            )
            verdict = Record("verdict", 1.0, "", note=f"Decode on {device} in {dtype}.")
            latency = timed("decode_latency", around(seconds))
            add_cell(store, sweep, "new", latency, verdict, *more, scenario=SHAPE, **setting)


def test_devices_and_types_are_told_apart(tmp_path, capsys):
    path = str(tmp_path / "results.db")
    with Store.open(path) as store:
        add_settings(store)
    assert run(["choose", "--db", path, "--format", "csv"]) == 0
    shown = capsys.readouterr()
    listed = list(csv.DictReader(io.StringIO(shown.out)))
    assert len(listed) == 4
    for row in listed:
        assert row["why"] == f"Decode on {row['device']} in {row['dtype']}."
        assert row[""] == ("take" if row["dtype"] == "bfloat16" else "no gain")
    assert f"m at {SHAPE} on a CPU in float32: keep the baseline" in shown.err
    assert f"m at {SHAPE} on a CPU in bfloat16: take new" in shown.err
    assert run(["why", "new", "--db", path]) == 0
    assert f"m · new · {SHAPE} · float32 · a CPU" in capsys.readouterr().out.splitlines()


def test_what_is_no_finite_number_ends_in_no_traceback(tmp_path, capsys):
    path = str(tmp_path / "results.db")
    with Store.open(path) as store:
        add_settings(
            store, Record("compression_ratio", math.inf, "x"), Record("decode_mbu", math.nan, "fraction")
        )
    assert run(["why", "new", "--db", path, "--format", "json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert {each["effect"]["compression_ratio"] for each in explained} == {"inf"}
    assert {(each["dtype"], each["device"]) for each in explained} == {
        (dtype, device) for dtype in ("bfloat16", "float32") for device in ("a GPU", "a CPU")
    }
    assert run(["choose", "--db", path, "--format", "json"]) == 0
    assert "ceiling" not in json.loads(capsys.readouterr().out)[0]["candidates"][0]["why"]
