"""A fork server whose imports have touched CUDA: what it forks could not use it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from harness.executors import cuda_driver
from harness.executors.server import SCRIPT, ForkServer, Launched
from tests.robustness import jobs
from tests.robustness.test_executor import run


def test_a_driver_that_is_not_loaded_is_not_started():
    def absent():
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert not cuda_driver.is_started(absent)


@pytest.mark.parametrize(("answer", "started"), [(3, False), (0, True), (100, True), (999, True)])
def test_a_started_driver_answers(answer, started):
    assert cuda_driver.is_started(lambda: SimpleNamespace(cuDeviceGetCount=lambda count: answer)) is started


def test_a_server_whose_imports_touch_cuda_begins_anew(tmp_path, monkeypatch):
    """It says so, imports nothing, and its workers work."""
    monkeypatch.chdir(tmp_path)
    log = (tmp_path / "log").open("w+b")

    def launch():
        ours, theirs = socket.socketpair()
        touched = (
            "from harness.executors import cuda_driver; cuda_driver.is_started = lambda: True; "
            "sys.modules['harness.executors.preload'] = sys; "
        )
        path = [each or os.getcwd() for each in sys.path]
        script = SCRIPT.format(path=path, control=theirs.fileno(), imports=True)
        script = script.replace(
            "from harness.executors.serving", touched + "from harness.executors.serving", 1
        )
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", script], pass_fds=[theirs.fileno()], stdout=log, stderr=log
            )
        return Launched(ours, process, log)

    server = ForkServer(launch)
    try:
        found = run(server, jobs.works, ("job",))
        assert [result.key for result in found] == ["job-0", "job-1", "job-2"]
        assert "an import has touched CUDA" in server.last_words()
    finally:
        server.close()
