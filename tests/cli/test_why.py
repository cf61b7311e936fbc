"""``harness why``: one real sweep explained, and what cannot be."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest

from harness.cli.app import run
from harness.records import Status
from harness.store import queries
from harness.store.store import Store
from tests.cli.test_sweep import FAST
from tests.core.stores import add_cell, add_sweep, around, timed

PIECES = "compiled in pieces: a wall"


@pytest.fixture
def swept(harness, tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "model")
    ran = harness("sweep", "--methods", "rtn:group_size=64", "--models", "./model", *FAST)
    assert ran.code == 0, ran.err
    return harness


def test_a_sweep_is_explained(swept):
    baseline, rtn = swept("why", "--format", "json").rows
    assert (baseline["method"], baseline["verdict"]) == ("baseline", None)
    assert rtn["method"] == "rtn:group_size=64"
    assert rtn["verdict"]
    assert 0 < rtn["effect"]["parameters_changed_share"] < 1
    assert rtn["effect"]["theoretical_compression_ratio"] > rtn["effect"]["compression_ratio"] > 1
    assert rtn["cost"]["transform_s"] > 0
    assert {row["phase"] for row in rtn["memory"]} == {"load", "transform", "prefill", "decode"}
    for row in rtn["memory"]:
        assert row["weight"] > 0
        assert row["host_peak"] > row["weight"]
    phases = {(row["phase"], row["unit"]): row for row in rtn["achieved"]}
    assert set(phases) == {("prefill", "FLOP/s"), ("decode", "FLOP/s"), ("decode", "B/s")}
    for row in phases.values():
        assert row["share_of_ceiling"] > 0
        assert row["mode"] == "cpu"
    for each in (baseline, rtn):
        for phase in ("prefill", "decode"):
            shares = [kernel["share"] for kernel in each["kernels"] if kernel["phase"] == phase]
            assert sum(shares) == pytest.approx(1.0)
            assert shares == sorted(shares, reverse=True) or "other" in str(each["kernels"])
    with Store.open_readonly("results.db") as store:
        manifest = queries.sweeps(store)["manifest"][0]
        assert manifest["ceilings"]["values"]["matmul_float32"] > 0
        frame = queries.kernels(store, queries.results(store)["cell"])
    assert set(frame["phase"]) == {"prefill", "decode"}

    table = swept("why", "rtn", "--top", "2").out
    assert "rtn:group_size=64" in table
    assert "baseline ·" not in table
    assert "verdict: " in table
    assert "  real, covers " in table
    assert "× on paper" in table
    assert "MBU" in table
    assert table.count("aten::") == 4
    listed = list(csv.DictReader(io.StringIO(swept("why", "rtn", "--format", "csv").out)))
    assert len(listed) == len(rtn["kernels"])

    # What is not timed again measures no ceilings and keeps its verdict.
    again = swept("sweep", "--methods", "rtn:group_size=64", "--models", "./model", *FAST)
    assert again.code == 0
    with Store.open_readonly("results.db") as store:
        first, second = queries.sweeps(store)["manifest"]
    assert first["ceilings"]["values"]
    assert second["ceilings"] is None
    [after] = swept("why", "rtn", "--format", "json").rows
    assert after["kernels"] == rtn["kernels"]
    assert after["verdict"]

    for arguments, message in (
        (("gptq",), "unknown method in this store: 'gptq'"),
        (("rtn,gptq",), "unknown method in this store: 'gptq'"),
        (("rtn", "--scenarios", "b9-p9-g9"), "nothing was timed there"),
        (("rtn", "--models", "./modle"), "unknown model in this store: './modle'"),
        (("rtn", "--sweep", "soon"), "--sweep takes a number or last"),
    ):
        failed = swept("why", *arguments)
        assert failed.code == 2
        assert message in failed.err


def test_the_doctor_shows_ceilings_and_whether_energy_is_counted(harness):
    checks = {row["check"]: row for row in harness("doctor", "--ceilings", "--format", "json").rows}
    assert checks["energy"]["state"] in ("ok", "absent")
    assert checks["energy"]["what"].partition(": ")[2]
    assert checks["ceiling matmul_float32"]["what"].endswith("FLOP/s")
    assert checks["ceiling copy"]["what"].endswith("B/s")


def test_a_store_without_timings_has_nothing_to_explain(harness, tmp_path, tiny_llama):
    Store.open(tmp_path / "results.db").close()
    ran = harness("why")
    assert ran.code == 2
    assert "nothing was timed there" in ran.err


def test_what_a_heading_leaves_out_is_alike_in_all(tmp_path, capsys):
    path = str(tmp_path / "results.db")
    with Store.open(path) as store:
        sweep, latency = add_sweep(store), timed("prefill_latency", around(0.02))
        add_cell(store, sweep, "rtn", latency, scenario="b1-p8-g2")
        add_cell(store, sweep, "rtn", latency, scenario="b1-p8-g2", dtype="float16", device_name="other")
    assert run(["why", "--db", path]) == 0
    told = capsys.readouterr().out
    assert "m · rtn · b1-p8-g2 · bfloat16 · a GPU\n" in told
    assert "m · rtn · b1-p8-g2 · float16 · other\n" in told
    assert run(["why", "--db", path, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["dtype"], row["device"]) for row in rows] == [("bfloat16", "a GPU"), ("float16", "other")]


@pytest.mark.parametrize(
    ("modes", "lines"),
    [
        ([("compiled", None)] * 2, []),
        (
            [("compiled", "compiled in pieces: a wall")] * 2,
            ["  prefill and decode: compiled in pieces: a wall"],
        ),
        (
            [("compiled", "compiled in pieces: a wall"), ("eager", "cannot be captured: .item()")],
            [f"  prefill: {PIECES}", "  decode: eager: cannot be captured: .item()"],
        ),
    ],
    ids=["whole", "both", "each its own"],
)
def test_why_a_phase_was_not_compiled_or_only_in_pieces(modes, lines, tmp_path, capsys):
    with Store.open(tmp_path / "results.db") as store:
        records = [
            replace(timed(f"{phase}_latency", around(0.02)), mode=mode, note=note)
            for phase, (mode, note) in zip(("prefill", "decode"), modes, strict=True)
        ]
        add_cell(store, add_sweep(store), "rtn", *records, scenario="b1-p8-g2")
    assert run(["why", "--db", str(tmp_path / "results.db")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if "pieces" in line or "captured" in line] == lines


def test_a_method_that_failed_is_not_unknown(tmp_path, capsys):
    with Store.open(tmp_path / "results.db") as store:
        add_cell(store, add_sweep(store), "broken", status=Status.FAILED, reason="ValueError: boom")
    assert run(["why", "broken", "--db", str(tmp_path / "results.db")]) == 2
    assert "error: nothing of broken was measured: failed: ValueError: boom" in capsys.readouterr().err
