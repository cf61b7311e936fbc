"""The whole command line with a model and a data set from a loopback hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.models.hub_server import serve_hub

TASK = """
task: colours
dataset_path: org/colours
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
SWEEP = (
    "--methods", "baseline", "--models", "org/tiny", "--tasks", "colours", "--include-path", "tasks",
    "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu",
)  # fmt: skip


def _rows(count):
    choices = ["red", "green"]
    row = [{"question": f"leaf {i} is", "choices": choices, "answer": i % 2} for i in range(count)]
    return {"test.jsonl": "\n".join(map(json.dumps, row)).encode()}


def _harness(tmp_path, endpoint, *arguments, **settings):
    # The hub's library reads its settings when it is imported, so it gets a process of its own.
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub-cache"),
        "HARNESS_CACHE": str(tmp_path / "cache"),
        **settings,
    }
    environment.pop("HARNESS_DB", None)
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240,
    )  # fmt: skip


@pytest.fixture
def served(tmp_path, checkpoint):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK)
    with serve_hub() as hub:
        hub.add("org/tiny", checkpoint)
        hub.add("org/colours", _rows(6), kind="dataset")
        yield hub


def _results(tmp_path, endpoint):
    ran = _harness(tmp_path, endpoint, "results", "--format", "json")
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_a_model_and_its_data_come_from_the_hub_and_then_from_the_cache(tmp_path, served):
    ran = _harness(tmp_path, served.endpoint, "sweep", *SWEEP)
    assert ran.returncode == 0, ran.stderr
    accuracy = [row for row in _results(tmp_path, served.endpoint) if row["metric"] == "acc"]
    assert [row["n"] for row in accuracy] == [6]
    # The branch of the data moves: only what was asked of them is to be measured again.
    served.repositories["datasets/org/colours"].commit(_rows(8))
    planned = _harness(tmp_path, served.endpoint, "sweep", *SWEEP, "--dry-run")
    assert "1 to measure, 2 already measured" in planned.stdout, planned.stdout
    # Without the hub, all is there at the commits that were measured.
    asked = len(served.requests)
    offline = _harness(tmp_path, served.endpoint, "sweep", *SWEEP, "--fresh", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(served.requests) == asked
    rows = _results(tmp_path, served.endpoint)
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["n"] for row in rows if row["metric"] == "acc"] == [6]


@pytest.mark.slow
def test_moved_data_are_scored_anew(tmp_path, served):
    assert _harness(tmp_path, served.endpoint, "sweep", *SWEEP).returncode == 0
    served.repositories["datasets/org/colours"].commit(_rows(8))
    assert _harness(tmp_path, served.endpoint, "sweep", *SWEEP).returncode == 0
    counts = [row["n"] for row in _results(tmp_path, served.endpoint) if row["metric"] == "acc"]
    assert sorted(counts) == [6, 8]


@pytest.mark.slow
def test_a_download_that_breaks_ends_the_sweep_before_it_began_and_the_next_run_goes_on(tmp_path, served):
    served.cut_after["model.safetensors"] = 1000
    broken = _harness(tmp_path, served.endpoint, "sweep", *SWEEP)
    assert broken.returncode == 2
    assert broken.stderr.startswith("error: model 'org/tiny': model.safetensors: the download broke off")
    assert "Traceback" not in broken.stderr
    served.cut_after.clear()
    again = _harness(tmp_path, served.endpoint, "sweep", *SWEEP)
    assert again.returncode == 0, again.stderr
    assert {row["status"] for row in _results(tmp_path, served.endpoint)} == {"ok"}


@pytest.mark.slow
def test_data_that_are_not_to_be_had_fail_their_cells_only(tmp_path, served):
    served.repositories.pop("datasets/org/colours")
    ran = _harness(tmp_path, served.endpoint, "sweep", *SWEEP)
    assert ran.returncode == 1, ran.stderr
    rows = _results(tmp_path, served.endpoint)
    failed = [row for row in rows if row["status"] != "ok"]
    assert {row["task"] for row in failed} == {"colours"}
    assert "data set 'org/colours' is not on the hub" in failed[0]["reason"]
    assert any(row["status"] == "ok" for row in rows)


@pytest.mark.slow
def test_a_hub_that_nobody_runs_is_one_clear_line_within_seconds(tmp_path):
    arguments = [argument for argument in SWEEP if argument not in ("--include-path", "tasks")]
    ran = _harness(tmp_path, "http://127.0.0.1:9", "sweep", *arguments, "--tasks", "none", "--dry-run")
    assert ran.returncode == 2
    line = ran.stderr.strip()
    assert line.startswith("error: model 'org/tiny' is not in the local cache, and the hub cannot be asked")
    assert "\n" not in line
