"""The real hub code path, against a loopback server that speaks the hub's API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from harness.models.loading import ZOO_DIR
from tests.models.hub_server import COMMIT, serve_hub

SWEEP = (
    "--tasks", "none", "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu",
    "--methods", "magnitude-prune",
)  # fmt: skip


def _harness(tmp_path, endpoint, *arguments, **settings):
    # The hub's client reads its settings when it is imported, so it gets a process of its own.
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hub-cache"),
        "HARNESS_CACHE": str(tmp_path / "cache"),
        **settings,
    }
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240,
    )  # fmt: skip


@pytest.fixture
def repository(tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "repository")
    for file in (ZOO_DIR / "llama-6m").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "repository")
    return tmp_path / "repository"


def test_a_hub_model_is_swept_at_the_commit_that_was_described(tmp_path, repository):
    with serve_hub({"org/tiny": repository}) as (endpoint, seen):
        ran = _harness(tmp_path, endpoint, "sweep", *SWEEP, "--models", "org/tiny")
        assert ran.returncode == 0, ran.stderr
        again = _harness(tmp_path, endpoint, "sweep", *SWEEP, "--models", "org/tiny@main")
        assert again.returncode == 0, again.stderr
    assert any(path.endswith("model.safetensors") for path in seen)
    rows = json.loads(_harness(tmp_path, endpoint, "results", "--format", "json").stdout)
    assert {row["status"] for row in rows} == {"ok"}
    # The same commit under another spelling is the same content: nothing was measured again.
    assert "4 of them already measured" in again.stderr
    assert any(COMMIT in path for path in seen)


def test_a_repository_that_does_not_exist_is_one_clear_error(tmp_path, repository):
    with serve_hub({"org/tiny": repository}) as (endpoint, _):
        ran = _harness(tmp_path, endpoint, "sweep", *SWEEP, "--models", "org/none")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: model 'org/none' from the hub: ")
    assert len(ran.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results.db").exists()


def test_without_the_hub_a_model_that_is_not_cached_is_one_clear_error(tmp_path):
    arguments = ("sweep", *SWEEP, "--models", "org/tiny")
    ran = _harness(tmp_path, "http://127.0.0.1:9", *arguments, HF_HUB_OFFLINE="1")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: model 'org/tiny' from the hub: ")
    assert len(ran.stderr.strip().splitlines()) == 1
