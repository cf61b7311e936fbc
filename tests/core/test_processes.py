"""Where tests run in several processes, those that share something stay in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import FIRST, TOGETHER, begins_first, group_of

ROOT = Path(__file__).parents[2]
NOTING = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(6))
def test_where(number):
    with (pathlib.Path(__file__).parent / "seen").open("a") as seen:
        print(pathlib.Path(__file__).name, os.getpid(), file=seen)
"""


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/core/test_grid.py::test_a[x/y.py::z]", "core/test_grid.py"),
        ("tests/cli/test_sweep.py::test_b", "sweeps"),
        ("tests/claims/test_running.py::test_c", "sweeps"),
        ("tests/claims/test_board.py::test_d", "claims/test_board.py"),
        ("tests/store/test_exchange.py::test_e", "store"),
        ("tests/test_method_contract.py::test_f", "test_method_contract.py"),
    ],
)
def test_groups(nodeid, group):
    assert group_of(nodeid) == group


def test_the_longest_begin_first():
    assert begins_first("tests/robustness/test_killing.py::test_a") == 0
    assert begins_first("tests/core/test_grid.py::test_a") == len(FIRST)
    places = [*TOGETHER, *(group for group in FIRST if group not in TOGETHER.values())]
    assert [place for place in places if not (ROOT / "tests" / place).exists()] == []


def test_xdist_runs_a_file_in_one_process(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"test_{name}.py").write_text(NOTING)
    command = (
        "-m", "pytest", "-p", "tests.processes", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup",
        "--rootdir", tmp_path, "-c", os.devnull, tmp_path,
    )  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(seen) == 4 * 6
    assert len({pid for _, pid in seen}) == 2
    assert len({tuple(pair) for pair in seen}) == 4
