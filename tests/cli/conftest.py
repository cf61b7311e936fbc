"""Running the command line."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import pytest

from harness.cli.app import run as run_harness
from harness.measure.ceilings import ceilings_of_sweep

_ceilings_once = functools.cache(ceilings_of_sweep)


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def rows(self):
        return json.loads(self.out)


@pytest.fixture
def harness(tmp_path, monkeypatch, capsys):
    """Run ``harness ...`` in an empty folder with a cache of its own.

    In this process, so that all sweeps of a test run share one fork server; its workers are processes of
    their own all the same. What the machine can do at most is measured once for all of them.
    """
    monkeypatch.setattr("harness.sweep.ceilings_of_sweep", _ceilings_once)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HARNESS_DB", raising=False)

    def run(*arguments):
        capsys.readouterr()
        code = run_harness([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
