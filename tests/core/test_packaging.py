"""A built wheel holds what the tree holds; the example distribution installs and works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from harness.cli.app import run

ROOT = Path(__file__).parents[2]
FOLDERS = {"harness": "harness", "plugins": "harness_plugins", "dashboard": "harness_dashboard"}


def _pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git tracks or would track: building must not litter the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(source.read_bytes())
    return copy


def test_a_wheel_holds_every_file_of_the_tree(tree, tmp_path):
    _pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tree)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(tree / folder)}"
        for folder, package in FOLDERS.items()
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packed == expected


def test_the_default_suite_leaves_out_what_needs_minutes_or_a_gpu(pytestconfig):
    assert {"gpu", "slow", "browser"} <= {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert "-m 'not gpu and not slow'" in (ROOT / "pyproject.toml").read_text()
    assert pytestconfig.getini("filterwarnings")[0] == "error"


def test_the_example_distribution_is_installed_and_swept(tmp_path, tiny_llama, monkeypatch, capsys):
    site = tmp_path / "site"
    source = tmp_path / "source"
    for path in (ROOT / "examples" / "harness-clip").rglob("*"):
        if path.is_file() and not {"build", "__pycache__"} & set(path.parts):
            target = source / path.relative_to(ROOT / "examples" / "harness-clip")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    _pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, source)
    tiny_llama.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(site), "HARNESS_CACHE": str(tmp_path / "cache")}

    def harness(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240,
        )  # fmt: skip

    monkeypatch.syspath_prepend(site)
    assert run(["plugins", "--format", "json"]) == 0
    (clip,) = [row for row in json.loads(capsys.readouterr().out) if row["plugin"] == "clip"]
    assert clip["origin"] == "entry point"
    assert clip["error"] is None
    ran = harness(
        "sweep", "--methods", "clip-weights:sigmas=1", "--models", "./model", "--tasks", "none",
        "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(harness("results", "--format", "json").stdout)
    (share,) = [row for row in rows if row["metric"] == "clipped_share"]
    # Random normal weights: a third of them are beyond one standard deviation.
    assert share["value"] == pytest.approx(0.317, abs=0.02)
