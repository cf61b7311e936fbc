"""Disks that are full or read-only, stores that others write to, and clocks that go backwards."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time

import pytest

from tests.robustness import stored


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of that size (or makes it that size): disk("300k")."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        remount = "remount," if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}{options}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def assert_one_line(swept, text):
    [line] = [line for line in swept.err.splitlines() if line.startswith("error:")]
    assert text in line
    assert "Traceback" not in swept.err


def test_a_full_disk_ends_the_sweep_and_freed_space_lets_it_go_on(nursery, tmp_path, command, disk):
    place = disk("size=420k")
    arguments = (*command("scale,scale:factor=0.25"), "--db", place / "results.db")
    swept = nursery.sweep(tmp_path, *arguments)
    assert swept.wait() == 2, swept.err
    assert_one_line(swept, "the disk is full; free some space and run the same command again")
    nursery.wait_until_empty()
    stored.assert_whole(place)
    finished = stored.cells(place)
    assert 0 < len(finished) < 9
    disk("size=20m")
    resumed = nursery.sweep(tmp_path, *arguments)
    assert resumed.wait() == 0, resumed.err
    assert f"{len(finished)} of them already measured" in resumed.err
    stored.assert_whole(place)
    assert finished.items() <= stored.cells(place).items()
    assert len(stored.cells(place)) == 9


def test_a_full_cache_ends_the_sweep_before_anything_false_is_stored(nursery, tmp_path, command, disk):
    place = disk("size=200k")
    arguments = command("caches,scale", task=False)
    swept = nursery.sweep(tmp_path, *arguments, HARNESS_CACHE=str(place))
    assert swept.wait() == 2, swept.err
    assert_one_line(swept, f"the disk of the cache {place} is full")
    nursery.wait_until_empty()
    assert set(stored.statuses(tmp_path)) == {"baseline"}
    disk("size=20m")
    resumed = nursery.sweep(tmp_path, *arguments, HARNESS_CACHE=str(place))
    assert resumed.wait() == 0, resumed.err
    assert {status for cells in stored.statuses(tmp_path).values() for status, _ in cells.values()} == {"ok"}


def test_a_read_only_directory_is_one_line(nursery, tmp_path, command, disk):
    place = disk("size=1m,ro")
    swept = nursery.sweep(tmp_path, *command("scale", task=False), "--db", place / "results.db")
    assert swept.wait() == 2
    assert_one_line(swept, "is read-only")


def test_another_writer_is_waited_for(nursery, tmp_path, command):
    """And where it does not let go, the sweep ends with one line and can be resumed."""
    first = nursery.sweep(tmp_path, *command("hangs"), "--timeout", 1)
    first.wait_for("baseline · tiny_words: ok")
    other = sqlite3.connect(tmp_path / "results.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    time.sleep(2.5)
    other.execute("ROLLBACK")
    assert first.wait() == 1, first.err
    stored.assert_whole(tmp_path)
    assert len(stored.cells(tmp_path)) == 6

    arguments = command("scale")
    locked = nursery.sweep(tmp_path, *arguments, patches={"harness.store.opening:BUSY_TIMEOUT_S": 0.3})
    locked.wait_for("variants,")
    other.execute("BEGIN IMMEDIATE")
    assert locked.wait() == 2, locked.err
    assert_one_line(locked, "locked by another process")
    other.execute("ROLLBACK")
    other.close()
    nursery.wait_until_empty()
    resumed = nursery.sweep(tmp_path, *arguments)
    assert resumed.wait() == 0, resumed.err
    stored.assert_whole(tmp_path)


def test_waiting_for_another_writer_can_be_interrupted(nursery, tmp_path, command):
    swept = nursery.sweep(tmp_path, *command("scale"))
    swept.wait_for("baseline · transform: ok")
    other = sqlite3.connect(tmp_path / "results.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    time.sleep(1.0)
    swept.kill(signal.SIGINT)
    time.sleep(0.2)
    swept.kill(signal.SIGINT)
    other.execute("ROLLBACK")
    other.close()
    assert swept.wait(20) == 130, swept.err
    nursery.wait_until_empty()
    stored.assert_whole(tmp_path)


def test_two_sweeps_on_one_store_at_once(nursery, tmp_path, command):
    """Cells that both want, both measure: both rows stay, the newer counts, each sweep has its own."""
    folders = [tmp_path / "left", tmp_path / "right", tmp_path / "other"]
    methods = ["scale", "scale", "scale:factor=0.25"]
    for folder in folders:
        folder.mkdir()
    both = [
        nursery.sweep(folder, *command(names), "--db", tmp_path / "results.db")
        for folder, names in zip(folders, methods, strict=True)
    ]
    assert [swept.wait() for swept in both] == [0, 0, 0], [swept.err for swept in both]
    nursery.wait_until_empty()
    assert stored.rows(tmp_path, "PRAGMA integrity_check") == [("ok",)]
    assert stored.rows(tmp_path, "SELECT status FROM sweeps") == [("finished",)] * 3
    per_sweep = (
        "SELECT count(DISTINCT key) FROM sweep_cells JOIN cells ON id = cell_id GROUP BY sweep_cells.sweep_id"
    )
    assert stored.rows(tmp_path, per_sweep) == [(6,), (6,), (6,)]
    found = stored.current(tmp_path)
    assert len(found) == 9
    assert {status for status, *_ in found.values()} == {"ok"}
    alone = tmp_path / "alone"
    alone.mkdir()
    assert nursery.sweep(alone, *command("scale,scale:factor=0.25")).wait() == 0
    assert stored.current(alone) == found


def test_a_clock_that_goes_backwards(nursery, tmp_path, command):
    """Times of day may be wrong; the order, the durations and what counts as newest are not."""
    arguments = command("scale")
    assert nursery.sweep(tmp_path, *arguments).wait() == 0
    modules = ("harness.store.store", "harness.executors.local")
    backwards = {f"{module}:datetime": "backwards" for module in modules}
    swept = nursery.sweep(tmp_path, *arguments, "--fresh", patches=backwards)
    assert swept.wait() == 0, swept.err
    first, second = stored.rows(tmp_path, "SELECT id, started_at, finished_at FROM sweeps ORDER BY id")
    assert second[1] < first[1]
    assert second[2] < second[1]
    newest = stored.rows(tmp_path, "SELECT sweep_id FROM cells GROUP BY key HAVING id = max(id)")
    assert set(newest) == {(2,)}
    assert stored.rows(tmp_path, "SELECT min(seconds) >= 0 FROM cells") == [(1,)]
    shown = nursery.sweep(tmp_path, "results", "--format", "json")
    assert shown.wait() == 0
    assert '"sweep": 2' in shown.out
    assert '"sweep": 1' not in shown.out
    again = nursery.sweep(tmp_path, *arguments)
    assert again.wait() == 0
    assert "6 of them already measured" in again.err
