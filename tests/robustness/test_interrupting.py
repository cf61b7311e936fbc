"""SIGINT, SIGTERM and SIGHUP at every stage, readers that hang up, and what a killed sweep looks like."""

from __future__ import annotations

import os
import signal
import time

import pytest

from harness.interrupts import Interrupted, Interrupts
from harness.store import queries
from harness.store.liveness import has_ended, this_process
from harness.store.store import Store
from tests.robustness import stored

SLOW_PLUGIN = """
import pathlib, time
pathlib.Path("importing").touch()
time.sleep(60)
"""


def assert_stopped(nursery, swept, number):
    assert swept.wait(30) == 128 + number, swept.err
    assert "the same command goes on" in swept.err
    assert "Traceback" not in swept.err
    nursery.wait_until_empty()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_during_a_transform_and_then_resumed(nursery, tmp_path, command, number):
    arguments = command("hangs,scale")
    swept = nursery.sweep(tmp_path, *arguments)
    swept.wait_for("baseline · tiny_words: ok")
    time.sleep(0.4)
    swept.kill(number)
    assert_stopped(nursery, swept, number)
    stored.assert_whole(tmp_path)
    assert stored.rows(tmp_path, "SELECT status FROM sweeps") == [("interrupted",)]
    assert stored.rows(tmp_path, "SELECT count(*) FROM cells") == [(3,)]
    resumed = nursery.sweep(tmp_path, *arguments, "--timeout", 1)
    assert resumed.wait() == 1
    assert "3 of them already measured" in resumed.err
    assert set(stored.statuses(tmp_path)) == {"baseline", "hangs", "scale"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_plugins_are_loaded(nursery, tmp_path, command, number):
    """No plugin's loading swallows it, and nothing was stored."""
    (tmp_path / "slow.py").write_text(SLOW_PLUGIN)
    swept = nursery.sweep(tmp_path, *command("scale"), "--plugin", "slow.py")
    deadline = time.monotonic() + 30
    while not (tmp_path / "importing").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    swept.kill(number)
    assert_stopped(nursery, swept, number)
    assert not (tmp_path / "results.db").exists()


@pytest.mark.parametrize("moment", ["INSERT INTO records", "before commit"])
def test_inside_a_write_the_cell_is_finished(nursery, tmp_path, command, moment):
    number = {"INSERT INTO records": 2, "before commit": 8}[moment]
    swept = nursery.sweep(tmp_path, *command("scale"), kill_at=(moment, number, signal.SIGINT))
    assert_stopped(nursery, swept, signal.SIGINT)
    stored.assert_whole(tmp_path)
    found = stored.current(tmp_path)
    assert found
    assert all(records for _, _, records, _ in found.values())
    assert swept.err.count(": ok") == len(found)  # said as well as stored


def test_pressed_twice_it_ends_all_the_same(nursery, tmp_path, command):
    swept = nursery.sweep(tmp_path, *command("hangs-with-family"))
    swept.wait_for("baseline · tiny_words: ok")
    time.sleep(0.3)
    swept.kill(signal.SIGINT)
    swept.kill(signal.SIGINT)
    assert swept.wait(30) == 130
    assert "Traceback" not in swept.err
    nursery.wait_until_empty()
    stored.assert_whole(tmp_path)


def test_the_first_is_deferred_and_the_second_is_not():
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests in the background
    with Interrupts() as interrupts:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted) as raised:
                interrupts.check()
            assert raised.value.exit_code == 130
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_a_run_it_takes_effect_at_once():
    with Interrupts(), pytest.raises(Interrupted) as raised:
        os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.exit_code == 143


def test_a_terminal_that_closes_does_not_stop_what_was_started_with_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupts.check()
    finally:
        signal.signal(signal.SIGHUP, before)


# --- readers that are gone -----------------------------------------------------------------------------


def test_a_sweep_whose_readers_are_gone_measures_all_the_same(nursery, tmp_path, command):
    """``harness sweep 2>&1 | head -1``: the exit code is still that of the sweep."""
    swept = nursery.sweep(tmp_path, *command("scale,exits-with-zero"), closed=(1, 2))
    assert swept.wait() == 1
    assert {status for status, _ in stored.statuses(tmp_path)["scale"].values()} == {"ok"}
    results = nursery.sweep(tmp_path, "results", "--format", "json", closed=(1,))
    assert results.wait() == 0
    assert results.err == ""


def test_a_terminal_that_is_closed_stops_no_sweep_that_was_disowned(nursery, tmp_path, command):
    """``harness sweep & disown`` and the window closed: it shows its progress to nobody, and goes on."""
    ours, theirs = os.openpty()
    swept = nursery.sweep(tmp_path, *command("hangs,scale", "--timeout", 3), terminal=os.ttyname(theirs))
    shown = b""
    while b"hangs" not in shown:
        shown += os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)
    assert swept.wait() == 1
    assert {status for status, _ in stored.statuses(tmp_path)["scale"].values()} == {"ok"}
    assert stored.rows(tmp_path, "SELECT status FROM sweeps") == [("finished",)]


# --- a sweep that could not say that it ended ----------------------------------------------------------


def test_a_killed_sweep_is_not_called_running(nursery, tmp_path, command):
    swept = nursery.sweep(tmp_path, *command("hangs"))
    swept.wait_for("baseline · tiny_words: ok")
    with Store.open_readonly(tmp_path / "results.db") as store:
        assert list(queries.sweeps(store)["status"]) == ["running"]
        swept.kill()
        swept.wait()
        assert list(queries.sweeps(store)["status"]) == ["interrupted"]
    nursery.wait_until_empty()


def test_only_what_certainly_ended_has_ended():
    here = this_process()
    assert here is not None
    assert not has_ended(here)
    assert has_ended({**here, "started": here["started"] - 1})  # its number was given to another
    assert not has_ended({**here, "namespace": 1, "started": 1})  # in another container
    assert not has_ended({**here, "boot": "another", "machine": None})  # perhaps another machine
    assert not has_ended({**here, "boot": "another", "machine": "another"})
    assert has_ended({**here, "boot": "another", "machine": "this one"}) == (here["machine"] == "this one")
    assert not has_ended(None)
    assert not has_ended({})
