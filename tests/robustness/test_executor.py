"""The executor with workers that only end: no model, so every kind of end takes milliseconds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

import pytest

from harness.config import LONGEST_S
from harness.errors import HarnessError
from harness.executors import local
from harness.executors.link import Ended, Link
from harness.executors.local import LocalExecutor
from harness.executors.server import ForkServer, Launched
from harness.records import CellResult, Status
from tests.robustness import jobs
from tests.robustness.jobs import HERE, make_job
from tests.robustness.nursery import _launch


@pytest.fixture
def server(nursery, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = ForkServer(lambda: _launch(nursery.path, Launched))
    yield made
    made.close()
    nursery.wait_until_empty()


def run(server, function, names=("job",), slots=1, on_result=lambda _: None, timeout_s=30.0, **options):
    """All results of jobs whose workers run this function."""
    found = []

    def take(job, message):
        if isinstance(message, CellResult):
            found.append(message)
        on_result(message)

    executor = LocalExecutor(slots, timeout_s, server=server, target=f"{HERE}:{function.__name__}", **options)
    executor.run([make_job(name) for name in names], take)
    return found


def until_news(link):
    select.select([link], [link] if link.wants_to_write else [], [], 30)
    return link.pump()


@pytest.mark.parametrize("slots", [1, 3])
def test_every_cell_is_reported_once(server, slots):
    found = run(server, jobs.works, "abcde", slots)
    assert sorted(result.key for result in found) == [f"{name}-{i}" for name in "abcde" for i in range(3)]
    assert {result.status for result in found} == {Status.OK}


@pytest.mark.parametrize("slots", [1, 2])
def test_a_server_that_is_killed_at_every_message(server, slots):
    """Between jobs, while a worker starts, while it works: all cells arrive, each once."""
    killed = set()

    def kill(_):
        pid = int(Path("server.pid").read_text())
        if pid not in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)

    found = run(server, jobs.works, "abcdef", slots, on_result=kill)
    assert sorted(result.key for result in found) == [f"{name}-{i}" for name in "abcdef" for i in range(3)]
    assert {result.status for result in found} == {Status.OK}
    assert len(killed) >= 3


def test_a_server_that_is_killed_before_many_workers_start(server, monkeypatch):
    """They all die with it, and count as one failure to start."""
    asked = 0

    def new_channel():
        nonlocal asked
        server.ensure_running()
        pid = int(Path("server.pid").read_text())
        if asked == 0:
            os.kill(pid, signal.SIGSTOP)  # as if at its imports
        channel = ForkServer.new_channel(server)
        asked += 1
        if asked == 8:
            os.kill(pid, signal.SIGKILL)
        return channel

    monkeypatch.setattr(server, "new_channel", new_channel)
    found = run(server, jobs.works, "abcdefgh", 8)
    assert [result.status for result in found] == [Status.OK] * 24


def test_what_was_finished_while_the_parent_was_held_up_counts(server):
    """By a locked store, or by Ctrl-Z: the result was sent in time, and is too long to be read at once."""
    held_up = []

    def hold_up(message):
        if isinstance(message, CellResult) and not held_up:
            held_up.append(message.key)
            time.sleep(2.5)

    found = run(server, jobs.gives_megabytes, ("early", "late"), 2, on_result=hold_up, timeout_s=2.0)
    assert held_up == ["early-0"]
    assert {result.key: result.reason for result in found} == {
        f"{name}-{i}": None for name in ("early", "late") for i in range(3)
    }


def test_the_longest_time_limit_of_many_cells_is_no_overflow(server):
    found = run(server, jobs.scores_together, timeout_s=LONGEST_S)
    assert [result.status for result in found] == [Status.OK] * 3


def test_a_server_that_nobody_asked_for_a_worker_ends_at_once():
    """As after a misspelt method: nobody waits for its imports."""
    made = ForkServer()
    made.ensure_running()
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 2


def test_a_worker_that_never_begins_ends_the_sweep_with_its_reason(server):
    with pytest.raises(HarnessError, match=r"^no worker can be started: RuntimeError: no such device$"):
        run(server, jobs.never_begins)


def test_a_server_that_cannot_be_started_is_one_clear_line(tmp_path):
    def refuse():
        raise OSError(11, "Resource temporarily unavailable")

    with pytest.raises(HarnessError, match="the process that starts workers cannot be started"):
        run(ForkServer(refuse), jobs.works)


def test_a_cell_that_is_killed_is_tried_twice_and_the_others_once(server):
    found = {result.key: result for result in run(server, jobs.is_killed_in_the_second_cell)}
    assert {key: result.status for key, result in found.items()} == {
        "job-0": Status.OK,
        "job-1": Status.CRASHED,
        "job-2": Status.OK,
    }
    assert found["job-1"].reason == "the worker process was killed by SIGKILL, twice"


def test_a_worker_that_the_kernel_killed_for_memory_is_oom_at_once(server, monkeypatch):
    kills = iter(range(100))
    monkeypatch.setattr(local, "oom_kills", lambda: next(kills))
    found = {result.key: result for result in run(server, jobs.is_killed_in_the_second_cell)}
    assert found["job-1"].status is Status.OOM
    assert found["job-1"].reason == "the system ran out of memory and killed the worker"


def test_an_abort_of_cpp_without_memory_is_oom(server):
    found = run(server, jobs.aborts_without_memory)
    assert {result.status for result in found} == {Status.OOM}
    assert all("bad_alloc" in result.log_tail for result in found)


def test_a_worker_that_asks_for_new_processes_for_ever_gets_no_more(server):
    found = run(server, jobs.asks_for_a_new_process_for_ever)
    assert [result.status for result in found] == [Status.CRASHED] * 3


def test_an_exception_of_the_parent_ends_all_workers(server):
    def fail(_):
        raise ZeroDivisionError

    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        run(server, jobs.works, "abc", 3, on_result=fail)
    assert time.monotonic() - started < 10


def test_a_killed_keeper_leaves_no_temporary_files(server):
    link = Link(server, make_job("killed"), target=f"{HERE}:{jobs.writes_a_temporary_file.__name__}")
    while not link.log_tail:
        until_news(link)
    file = Path(link.log_tail)
    assert file.exists()
    os.kill(link._pids["keeper"], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while file.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not file.parent.exists()
    link.stop()


def test_the_server_spares_a_worker_that_starts_while_it_cleans_up_behind_a_killed_keeper(server):
    """Whatever the moment at which the next worker is forked."""
    for _ in range(40):
        link = Link(server, make_job("killed"), target=f"{HERE}:{jobs.waits_for_its_end.__name__}")
        while not link.started:
            until_news(link)
        os.kill(link._pids["keeper"], signal.SIGKILL)
        following = Link(server, make_job("next"), target=f"{HERE}:{jobs.works.__name__}")
        while following.ended is None:
            until_news(following)
        link.stop()
        assert following.ended == Ended(started=True, exit_code=0)
