"""Whole sweeps from the command line on small models."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLUGIN = str(Path(__file__).parent / "failing_methods.py")
ODD = """
import pathlib
import torch
from harness import Method, Options, hookimpl
from harness.nn.surgery import block_linears

@torch.no_grad()
def transform(model, options, context):
    if not pathlib.Path(__file__).with_name("works").exists():
        raise RuntimeError("not yet")
    for _, linear in block_linears(model):
        linear.weight.mul_(0.5)
    return model

@hookimpl
def register_methods():
    return [Method(name="odd", options=Options, transform=transform)]
"""
FAST = ("--tasks", "none", "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu")


@pytest.fixture
def checkpoint(tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "model")
    return "./model"


def _by_method(rows):
    found = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def test_a_sweep_fills_the_store_and_again_measures_nothing(harness, checkpoint):
    arguments = ("sweep", "--plugin", PLUGIN, "--methods", "scale", "--models", checkpoint, *FAST)
    first = harness(*arguments)
    assert first.code == 0, first.err
    assert "scale" in first.out
    rows = harness("results", "--format", "json").rows
    required = {
        "sweep", "model", "method", "options", "seed", "dtype", "device", "status", "reason", "task",
        "scenario", "metric", "value", "unit", "lower", "upper", "n", "synthetic",
    }  # fmt: skip
    for row in rows:
        assert required <= set(row)
    methods = _by_method(rows)
    assert set(methods) == {"baseline", "scale"}
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["scenario"] for row in rows} == {"transform", "b1-p8-g2"}
    metrics = {row["metric"] for row in methods["scale"]}
    assert {"prefill_latency", "decode_latency", "weight_bytes", "transform_s"} <= metrics
    (latency,) = [r for r in methods["scale"] if r["metric"] == "decode_latency"]
    assert 0 < latency["lower"] <= latency["value"] <= latency["upper"]
    assert latency["n"] > 3
    assert methods["scale"][0]["options"] == {"factor": 0.5}

    again = harness(*arguments)
    assert again.code == 0
    assert "4 of them already measured" in again.err
    assert harness("results", "--format", "json").rows == rows

    fresh = harness(*arguments, "--fresh")
    assert fresh.code == 0
    newer = harness("results", "--format", "json").rows
    assert len(newer) == len(rows)
    assert {row["sweep"] for row in newer} == {3}


def test_nothing_is_timed_where_no_prompt_length_is_wanted(harness, checkpoint):
    arguments = ("--plugin", PLUGIN, "--methods", "scale", "--models", checkpoint, "--tasks", "none")
    done = harness("sweep", *arguments, "--prompt-lens", "none", "--device", "cpu")
    assert done.code == 0, done.err
    rows = harness("results", "--format", "json").rows
    assert {row["method"] for row in rows} == {"baseline", "scale"}
    assert {row["scenario"] for row in rows} == {"transform"}
    unset = harness("sweep", *arguments, "--prompt-lens", "", "--device", "cpu")
    assert unset.code == 2
    assert "--prompt-lens: must be whole numbers separated by commas, not empty" in unset.err


def test_a_model_without_its_weights_is_not_applicable(harness, checkpoint, tmp_path):
    """What accelerate leaves of a model that it keeps on disk: shapes on the meta device."""
    (tmp_path / "hollow.py").write_text(
        "from pathlib import Path\n"
        "from harness import hookimpl\n"
        "from harness.models.loading import describe, load\n"
        "@hookimpl\n"
        "def load_model(spec, device, dtype):\n"
        "    import torch\n"
        "    loaded = load(describe(spec), device, getattr(torch, dtype), 0)\n"
        "    loaded.model.model.layers[1].mlp.to('meta')\n"
        "    return loaded\n"
    )
    arguments = (
        "--methods",
        "rtn:group_size=32,gptq:group_size=32",
        "--models",
        checkpoint,
        "--tasks",
        "none",
    )
    done = harness("sweep", "--plugin", "hollow.py", *arguments, "--prompt-lens", "none", "--device", "cpu")
    assert done.code == 0, done.err
    rows = harness("results", "--format", "json").rows
    assert len(rows) == 3
    assert {row["status"] for row in rows} == {"not_applicable"}
    (reason,) = {row["reason"] for row in rows}
    assert reason.endswith(
        "model.layers.1.mlp.gate_proj.weight is on the meta device, without values; "
        "load the whole model into memory"
    )


def test_every_failure_is_a_stored_result_and_the_others_go_on(harness, checkpoint):
    names = "raises,refuses,eats,hangs,dies,exits,nothing,wrong-type,hangs-later,scale"
    ran = harness(
        "sweep", "--plugin", PLUGIN, "--methods", names, "--models", checkpoint, *FAST, "--timeout", "8"
    )
    assert ran.code == 1, ran.err
    methods = _by_method(harness("results", "--format", "json").rows)
    expected = {
        "raises": ("failed", "ValueError: the method is wrong"),
        "refuses": ("not_applicable", "only on Sundays"),
        "eats": ("oom", "allocate"),
        "hangs": ("timeout", "longer than 8 s"),
        "dies": ("crashed", "SIGKILL"),
        "exits": ("crashed", "exit code 7"),
        "nothing": ("no_effect", "changed nothing"),
        "wrong-type": ("failed", "must return the model"),
    }
    for name, (status, reason) in expected.items():
        for row in methods[name]:
            assert row["status"] == status, (name, row)
            assert reason in row["reason"], (name, row)
    assert {row["status"] for row in methods["scale"]} == {"ok"}
    assert {row["status"] for row in methods["baseline"]} == {"ok"}
    # The transform of this one is fine; only the timed cell hangs.
    later = {row["scenario"]: row["status"] for row in methods["hangs-later"]}
    assert later == {"transform": "ok", "b1-p8-g2": "timeout"}
    with sqlite3.connect("results.db") as connection:
        (tail,) = connection.execute(
            "select log_tail from cells where log_tail like '%last words%' limit 1"
        ).fetchone()
    connection.close()
    assert "last words" in tail


def test_retry_failed_measures_only_the_failures(harness, checkpoint, tmp_path):
    arguments = ("sweep", "--methods", "odd", "--models", checkpoint, *FAST, "--plugin", "odd.py")
    (tmp_path / "odd.py").write_text(ODD)
    assert harness(*arguments).code == 1
    assert harness(*arguments).code == 1  # a failure stands until it is asked for again
    (tmp_path / "works").write_text("")
    ran = harness(*arguments, "--retry-failed")
    assert ran.code == 0, ran.err
    assert "2 of them already measured" in ran.err
    rows = harness("results", "--format", "json").rows
    assert {row["status"] for row in rows} == {"ok"}


def test_dry_run_shows_the_matrix_and_writes_nothing(harness, checkpoint, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    ran = harness(
        "sweep", "--plugin", PLUGIN, "--methods", "scale,gptq", "--models", checkpoint, *FAST, "--dry-run"
    )
    assert ran.code == 0, ran.err
    assert "scale" in ran.out
    assert "calibration" in ran.out
    assert "6 to measure" in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_sweep_ends_with_which_method_to_take(harness):
    arguments = ("sweep", "--methods", "rtn", "--models", "zoo:opt-4m", "--device", "cpu", "--for", "weights")
    arguments += ("--tasks", "grammar", "--limit", "200", "--prompt-lens", "none")
    done = harness(*arguments, "--lose", "50%")
    assert done.code == 0, done.err
    answer = done.out.strip().splitlines()[-1]
    assert answer.startswith("zoo:opt-4m on "), answer
    assert ": take rtn: the weights " in answer
    assert "grammar" in answer
    asked = harness("choose", "--for", "weights", "--lose", "50%")
    assert asked.out.strip().splitlines()[-1] == answer
    again = harness(*arguments, "-q")
    assert again.out.strip().splitlines()[-1] != answer, "1 % may be lost where nothing else is said"
    assert "take rtn" not in again.out


def test_a_sweep_without_an_answer_is_a_success(harness, checkpoint):
    arguments = ("--methods", "baseline", "--models", checkpoint, *FAST)
    done = harness("sweep", *arguments, "--for", "decode")
    assert done.code == 0, done.err
    assert "nothing to choose: nothing was measured beside the baseline" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--for", "speed"), "goal"),
        (("--for", "decode", "--lose", "much"), "--lose 'much'"),
        (("--lose", "1%"), "--lose goes with --for"),
        (("--for", "decode", "--prompt-lens", "none"), "--for decode needs a timed shape"),
    ],
    ids=str,
)
def test_a_question_that_cannot_be_answered_ends_before_the_sweep(harness, tmp_path, arguments, says):
    ran = harness("sweep", "--methods", "rtn", "--models", "zoo:opt-4m", *arguments)
    assert ran.code == 2
    assert says in ran.err
    assert not (tmp_path / "results.db").exists()


def test_a_synthetic_model_is_timed_and_its_accuracy_refused(harness):
    ran = harness(
        "sweep", "--methods", "magnitude-prune", "--models", "shape:llama-15m", "--prompt-lens", "4",
        "--new-tokens", "1", "--device", "cpu",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = harness("results", "--format", "json").rows
    assert {row["synthetic"] for row in rows} == {True}
    tasks = [row for row in rows if row["task"]]
    assert {(row["status"], row["metric"]) for row in tasks} == {("not_applicable", None)}
    assert all("random weights" in row["reason"] for row in tasks)
    assert any(row["metric"] == "decode_latency" and row["value"] > 0 for row in rows)


def test_a_scratch_model_is_trained_after_the_transform(harness):
    ran = harness(
        "sweep", "--plugin", PLUGIN, "--methods", "nothing,scale", "--models", "scratch:llama-nano", *FAST,
        "--train-steps", "3", "--train-len", "16",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    methods = _by_method(harness("results", "--format", "json").rows)
    for name in ("baseline", "scale"):
        records = {row["metric"]: row["value"] for row in methods[name]}
        assert records["trained_steps"] == 3
        assert records["trained_tokens"] == 3 * 8 * 16
    # Training moved every weight, but the method itself did nothing.
    assert {row["status"] for row in methods["nothing"]} == {"no_effect"}


def test_a_saved_directory_is_scored_like_the_bundled_model(harness, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.models.loading import ZOO_DIR

    AutoModelForCausalLM.from_pretrained(ZOO_DIR / "opt-4m").save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(ZOO_DIR / "opt-4m").save_pretrained(tmp_path / "saved")
    ran = harness(
        "sweep", "--methods", "rtn:bits=3", "--models", "zoo:opt-4m,./saved", "--tasks", "kjv", "--limit",
        "1", "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = harness("results", "--format", "json", "--tasks", "kjv").rows
    scores = {
        model: {(row["method"], row["metric"]): row["value"] for row in rows if row["model"] == model}
        for model in ("zoo:opt-4m", "./saved")
    }
    assert {row["status"] for row in rows} == {"ok"}
    assert scores["./saved"] == scores["zoo:opt-4m"]
    assert scores["./saved"]["rtn:bits=3", "nll_rise"] > 0
    assert scores["./saved"]["baseline", "mean_kl"] < 1e-6


def test_workers_die_with_their_parent(harness, checkpoint, tmp_path):
    arguments = ("sweep", "--plugin", PLUGIN, "--methods", "hangs", "--models", checkpoint, *FAST)
    process, _ = _running_until("baseline · b1-p8-g2: ok", tmp_path, arguments)
    time.sleep(1.0)
    family = _descendants(process.pid)
    assert family, "the worker and the fork server should run now"
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in family if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive


def _running_until(line, folder, arguments):
    """A sweep as a process of its own that has just reported this line, and all it reported."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments],
        cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = ""
    while line not in seen:
        news = process.stderr.readline()
        assert news, seen
        seen += news
    return process, seen


def _descendants(pid):
    """All processes below this one, by /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += frontier
    return found


def test_a_method_that_calibrates_in_silence_is_not_stored_under_any_budget(harness, checkpoint, tmp_path):
    (tmp_path / "silent.py").write_text(
        "from harness import Method, Options, hookimpl\n"
        "def transform(model, options, context):\n"
        "    context.calibration()\n"
        "    return model\n"
        "@hookimpl\n"
        "def register_methods():\n"
        "    return [Method(name='silent', options=Options, transform=transform)]\n"
    )
    arguments = ("--methods", "silent", "--models", checkpoint, "--tasks", "none", "--prompt-lens", "none")
    done = harness("sweep", "--plugin", "silent.py", *arguments, "--device", "cpu")
    assert done.code == 1, done.err
    (row,) = harness("results", "--format", "json", "--methods", "silent").rows
    assert row["status"] == "failed"
    assert "uses calibration and does not say so: add needs=['calibration']" in row["reason"]
