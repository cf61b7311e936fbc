"""What is measured for claims: merged sweeps, the budget, and the command line from end to end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys

import pytest

from harness.claims import SweepNeed
from harness.claims.running import Means, affordable, merged
from harness.cli.app import run
from tests.claims.rows import MODEL, OTHER, begin, claim, scored

PLUGIN = """
from pathlib import Path

from harness import ModelEntry, hookimpl
from harness.claims import Claim, SweepNeed, all_of, loses_less, times_smaller

FINE, COARSE = "rtn:bits=8", "rtn:bits=2:group_size=16"
HERE = Path(__file__).parent


@hookimpl
def register_models():
    return [ModelEntry("mine", str(HERE / "model"))]


@hookimpl
def register_claims():
    need = SweepNeed(("mine",), (FINE, COARSE), making_s=60)
    smaller = times_smaller("weight_bytes", 1.05, model="mine", method=COARSE, than=FINE, place="transform")
    larger = times_smaller("weight_bytes", 1.05, model="mine", method=FINE, than=COARSE, place="transform")
    loss = SweepNeed(("shape:llama-15m",), (FINE,), ("kjv",), making_s=6000)
    absent = SweepNeed(("mine",), ("no-such",))
    about = {"section": "mine", "source": "nobody 2026", "methods": ("rtn",)}

    def explode(evidence):
        raise RuntimeError("on purpose")

    return [
        Claim("smaller", says="Two bits are less.", sweep=(need,), decide=all_of(smaller), **about),
        Claim("larger", says="Eight bits are less.", sweep=(need,), decide=all_of(larger), **about),
        Claim("absent", says="It is not.", sweep=(absent,), decide=all_of(smaller), **about),
        Claim("hostile", says="It breaks.", sweep=(need,), decide=explode, **about),
        Claim("dear", says="It takes hours.", sweep=(loss,), decide=all_of(), **about),
    ]
"""
MINE = ("--claim", "smaller", "--claim", "larger", "--claim", "hostile", "--claim", "absent")


@pytest.fixture
def folder(tmp_path, tiny_llama, monkeypatch):
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "plug.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def board_of(capsys, *arguments, code=0):
    assert run(["reproduce", "--plugin", "plug.py", "--device", "cpu", *arguments]) == code
    return capsys.readouterr().out


# --- what to run --------------------------------------------------------------------------------------


def test_needs_are_joined_where_settings_agree():
    a = claim(id="a", need=SweepNeed((MODEL, OTHER), ("x",), ("text",)))
    b = claim(id="b", need=SweepNeed((MODEL, OTHER), ("y",), ("text",)))
    c = claim(id="c", need=SweepNeed((MODEL,), ("x",), ("text",), train_steps=5))
    works = merged([a, b, c])
    assert [(work.models, work.methods, work.claims) for work in works] == [
        ((MODEL, OTHER), ("x", "y"), frozenset("ab")),
        ((MODEL,), ("x",), frozenset("c")),
    ]
    assert [work.settings.get("train_steps") for work in works] == [None, 5]


def test_a_method_is_run_on_the_models_that_need_it_only():
    a = claim(id="a", need=SweepNeed((MODEL, OTHER), ("x",), ("text",)))
    b = claim(id="b", need=SweepNeed((MODEL,), ("y",), ("text",)))
    assert {(work.models, work.methods) for work in merged([a, b])} == {
        ((MODEL,), ("x", "y")),
        ((OTHER,), ("x",)),
    }


def test_what_is_timed_runs_alone():
    timed = claim(need=SweepNeed((MODEL,), ("x",), prompt_lens=(64,)))
    scored_only = claim(need=SweepNeed((MODEL,), ("x",), ("text",)))
    assert merged([timed])[0].config("cpu", Means(jobs=4)).jobs == 1
    assert merged([scored_only])[0].config("cpu", Means(jobs=4)).jobs == 4


def test_a_budget_takes_claims_in_their_order_and_pays_shared_variants_once():
    claims = [claim(id=name, need=SweepNeed((MODEL,), ("x",), ("text",))) for name in ("a", "b", "c", "d")]
    needed = {"a": {1: 40.0, 2: 30.0}, "b": {3: 60.0}, "c": {1: 40.0, 4: 20.0}, "d": {}}
    fitting, beyond = affordable(claims, needed, 100)
    assert [each.id for each in fitting] == ["a", "c", "d"]
    assert beyond == {"b": 30.0}
    assert affordable(claims, needed, 0)[0] == [claims[3]], "what needs nothing is always decided"


# --- the command --------------------------------------------------------------------------------------


def test_a_plugins_claims_are_measured_and_decided_in_every_format(folder, capsys):
    rows = {row["claim"]: row for row in json.loads(board_of(capsys, *MINE, "--format", "json"))}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "smaller": "holds", "larger": "does_not_hold", "hostile": "not_decidable",
        "absent": "not_decidable",
    }  # fmt: skip
    assert "RuntimeError: on purpose" in rows["hostile"]["why"]
    assert rows["absent"]["why"].startswith("cannot be measured here: unknown method 'no-such'")
    assert rows["smaller"]["findings"][0]["value"] > 1.05
    assert len(rows["smaller"]["cells"]) == 2
    # Nothing is measured again: the second board comes from the store alone.
    stored = board_of(capsys, *MINE, "--budget", "0", "--format", "csv")
    [first, *_] = csv.DictReader(stored.splitlines())
    assert (first["claim"], first["outcome"]) == ("smaller", "holds")
    table = board_of(capsys, *MINE, "--budget", "0")
    assert "does not hold" in table
    assert "4 claims: 1 holds, 1 does not hold, 2 are not decidable" in table
    assert "| mine | larger | does not hold |" in board_of(
        capsys, *MINE, "--budget", "0", "--format", "markdown"
    )


def test_what_does_not_fit_the_budget_says_how_much_more_it_needs(folder, capsys):
    chosen = ("--claim", "dear", "--claim", "smaller", "--budget", "0.5", "--format", "json", "-q")
    dear, smaller = sorted(json.loads(board_of(capsys, *chosen)), key=lambda row: row["claim"])
    assert dear["outcome"] == smaller["outcome"] == "not_decidable"
    assert smaller["why"].startswith("not measured: needs about")
    assert smaller["why"].endswith("more than the budget of 0.5 minutes")


def test_listing_measures_nothing(folder, capsys):
    out = board_of(capsys, "--list", "--claim", "smaller", "--format", "json")
    [row] = json.loads(out)
    assert row["sweep"][0]["models"] == ["mine"]
    assert row["minutes"] == 3.0
    assert not (folder / "results.db").exists()


def test_an_unknown_claim_is_refused_with_near_matches(folder, capsys):
    arguments = ["reproduce", "--claim", "gptq-beats-rounding-at-5-bits"]
    assert run(arguments) == 2
    assert "did you mean 'gptq-beats-rounding-at-4-bits'" in capsys.readouterr().err
    assert not (folder / "results.db").exists()


def test_a_negative_budget_is_refused(folder, capsys):
    assert run(["reproduce", "--budget", "-1"]) == 2
    assert "budget" in capsys.readouterr().err


def test_failed_cells_are_an_exit_code_and_a_reason(folder, capsys):
    (folder / "plug.py").write_text(
        PLUGIN
        + """

from harness import Method, Options


def transform(model, options, context):
    raise RuntimeError("broken on purpose")


@hookimpl
def register_methods():
    return [Method(name="broken", options=Options, transform=transform)]
"""
    )
    text = (folder / "plug.py").read_text().replace('FINE, COARSE = "rtn:bits=8"', 'FINE, COARSE = "broken"')
    (folder / "plug.py").write_text(text)
    [row] = json.loads(board_of(capsys, "--claim", "smaller", "--format", "json", "-q", code=1))
    assert row["outcome"] == "not_decidable"
    assert "failed" in row["why"]


@pytest.mark.slow
def test_a_signal_ends_it_cleanly(folder):
    command = [sys.executable, "-m", "harness", "reproduce", "--plugin", "plug.py", "--claim", "smaller",
               "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
    lines = []
    assert process.stderr is not None
    for line in process.stderr:  # until a cell is being measured
        lines.append(line)
        if "variants" in line:
            os.kill(process.pid, signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, (lines, err)
    assert "interrupted (SIGTERM); the same command goes on where this stopped" in err
    assert "Traceback" not in err + out


def test_rows_of_the_store_are_enough(store, tmp_path, capsys):
    sweep = begin(store)
    for model in ("zoo:llama-6m", "zoo:opt-4m"):
        scored(store, sweep, "gptq:group_size=64", 0.1, place="kjv", model=model)
        scored(store, sweep, "rtn:group_size=64", 0.3, place="kjv", model=model)
    arguments = ["reproduce", "--budget", "0", "--db", str(tmp_path / "results.db"), "--device", "cpu"]
    assert run([*arguments, "--claim", "gptq-beats-rounding-at-4-bits"]) == 0
    assert "holds" in capsys.readouterr().out
