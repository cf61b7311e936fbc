"""Stores that a sweep filled, without the time that its worker processes take to start."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil

import pytest

from harness.cli.app import run as run_harness
from harness.testing import tiny_model
from harness.worker import run_worker
from tests.cli.conftest import Ran


class _Here:
    """Runs jobs in this process, one after the other."""

    def __init__(self, *arguments, **options):
        pass

    def run(self, jobs, on_message):
        for job in jobs:
            run_worker(job, lambda message, job=job: on_message(job, message))


def _runner(monkeypatch, folder, capture):
    monkeypatch.setattr("harness.sweep.LocalExecutor", _Here)
    monkeypatch.setattr("harness.executors.server.start_fork_server", lambda: None)
    # A worker collects garbage before it measures memory: a second each time among all that tests hold.
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HARNESS_CACHE", str(folder / "cache"))
    monkeypatch.delenv("HARNESS_DB", raising=False)

    def run(*arguments):
        capture()
        code = run_harness([str(argument) for argument in arguments])
        captured = capture()
        return Ran(code, captured.out, captured.err)

    return run


@contextlib.contextmanager
def _same_logging():
    """A worker sets up logging for its process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def sweep(run, methods, *options, model="./tiny"):
    """Sweep methods over a model; nothing is timed or scored."""
    done = run(
        "sweep", "--models", model, "--methods", methods, "--tasks", "none", "--prompt-lens", "none",
        "--calibration-samples", "2", "--calibration-len", "32", "--quiet", *options,
    )  # fmt: skip
    assert done.code == 0, done.err


@pytest.fixture
def harness(tmp_path, monkeypatch, capsys):
    """Run ``harness ...`` in an empty folder; sweeps measure in this process."""
    with _same_logging():
        yield _runner(monkeypatch, tmp_path, capsys.readouterr)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A tiny local model, ``./tiny``, and a store with some variants of it."""
    folder = tmp_path_factory.mktemp("swept")
    tiny_model("llama").save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as monkeypatch, _same_logging():
        run = _runner(monkeypatch, folder, lambda: Ran(0, "", ""))
        sweep(run, "rtn:bits=4:group_size=32,rtn:bits=8:a_bits=8,fp8:fmt=e5m2")
        sweep(run, "rtn:bits=8", "--seed", "0,1")
    return folder


@pytest.fixture
def swept(harness, template, tmp_path):
    """A copy of `template` in the folder of `harness`."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
