"""Processes that die, wait for each other, and disks that fill up."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import event, text

from harness.errors import StoreError
from harness.store import opening, queries
from harness.store.store import Store
from tests.store.rows import begin_sweep, make_result, write_task

# Writes cells that are not there yet, saying the key of each once it is written.
WRITER = """
import sys
from tests.store.rows import begin_sweep, make_result, write_task
from harness.records import Item, Record
from harness.store.store import Store

store = Store.open(sys.argv[1])
sweep = begin_sweep(store)
keys = [f"{sys.argv[2]}-{number}" for number in range(int(sys.argv[3]))]
items = tuple(Item(index, "acc", 1.0, {"text": "x" * 40}) for index in range(300))
records = tuple(Record(f"m{index}", 1.0, "s", samples=(1.0,) * 20) for index in range(5))
done = store.finished_cells(keys)
print("ready", flush=True)
for key in keys:
    if key not in done:
        write_task(store, sweep, make_result(key, records=records, items=items))
        print(key, flush=True)
store.close_sweep(sweep, "finished")
print("end", flush=True)
"""

HALVES = """
SELECT key FROM cells WHERE
    (SELECT count(*) FROM items WHERE cell_id = cells.id) != 300
    OR (SELECT count(*) FROM records WHERE cell_id = cells.id) != 5
    OR (SELECT count(*) FROM samples JOIN records ON records.id = record_id
        WHERE cell_id = cells.id) != 100
    OR (SELECT count(*) FROM sweep_cells WHERE cell_id = cells.id) != 1
"""

ROOT = Path(__file__).parents[2]


def start_writer(target, name, cells):
    command = [sys.executable, "-c", WRITER, str(target), name, str(cells)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def assert_whole(target, keys):
    if isinstance(target, Path):
        connection = sqlite3.connect(target)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()
    with Store.open_readonly(target) as store, store.reading() as connection:
        stored = list(connection.scalars(text("SELECT key FROM cells")))
        halves = connection.execute(text(HALVES)).all()
    assert len(stored) == len(set(stored)), "a cell was doubled"
    assert keys <= set(stored), "a cell that was finished is lost"
    assert halves == []
    return set(stored)


def test_killed_at_any_moment_nothing_finished_is_lost_or_doubled(target):
    said: set[str] = set()
    chance = random.Random(0)
    for _ in range(4 if isinstance(target, Path) else 2):
        with start_writer(target, "cell", 100_000) as child:
            assert child.stdout.readline() == "ready\n"
            first = [child.stdout.readline().strip() for _ in range(2)]  # it is at work, however slow
            time.sleep(chance.uniform(0.02, 0.25))
            child.send_signal(signal.SIGKILL)
            lines = first + child.stdout.read().split("\n")
        assert child.returncode == -signal.SIGKILL
        said |= set(lines[:-1])
        stored = assert_whole(target, said)
        assert len(stored - said) <= 1, "only the cell in flight may be there unsaid"
        said = stored
    assert len(said) >= 4
    with Store.open_readonly(target) as store:
        assert set(queries.sweeps(store)["status"]) == {"running"}


@pytest.mark.parametrize("moment", ["insert cells", "insert items", "commit"])
def test_killed_inside_a_transaction(path, moment):
    """Killed exactly between two statements of one cell, and just before its commit."""
    script = f"""
import os, signal, sys
from tests.store.rows import begin_sweep, make_result, write_task
from harness.store.store import Store
from sqlalchemy import event

store = Store.open(sys.argv[1])
sweep = begin_sweep(store)
write_task(store, sweep, make_result("first"))
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def after(connection, cursor, statement, *_):
    if statement.lower().startswith("{moment} ".replace("insert ", "insert into ")):
        die()
event.listen(store.engine, "commit" if "{moment}" == "commit" else "after_cursor_execute",
             die if "{moment}" == "commit" else after)
write_task(store, sweep, make_result("second"))
"""
    command = [sys.executable, "-c", script, str(path)]
    ended = subprocess.run(command, cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    with Store.open(path) as store:
        assert set(store.finished_cells(["first", "second"])) == {"first"}
        write_task(store, 1, make_result("second"))
        assert len(queries.results(store)) == 4


def test_two_processes_make_and_fill_one_store_at_once(fresh_target):
    names, cells = ("left", "right", "middle"), 12
    children = [start_writer(fresh_target, name, cells) for name in names]
    for child in children:
        with child:
            assert child.stdout.read().split("\n")[-2] == "end"
        assert child.returncode == 0
    assert assert_whole(fresh_target, set()) == {f"{name}-{i}" for name in names for i in range(cells)}
    with Store.open_readonly(fresh_target) as store:
        assert len(queries.variants(store)) == 1


def test_a_lock_that_is_held_too_long(path, monkeypatch):
    monkeypatch.setattr(opening, "BUSY_TIMEOUT_S", 0.05)
    with Store.open(path) as store:
        sweep = begin_sweep(store)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"^results store .*: locked by another process"):
            write_task(store, sweep, make_result())
        assert queries.results(store).empty, "readers do not wait"
        other.execute("ROLLBACK")
        other.close()
        write_task(store, sweep, make_result())


def test_opening_a_store_that_another_process_holds(path, monkeypatch):
    monkeypatch.setattr(opening, "BUSY_TIMEOUT_S", 0.05)
    Store.open(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    for opener in (Store.open, Store.open_readonly):
        with pytest.raises(StoreError, match="locked by another process"):
            opener(path)
    other.close()


def test_a_file_whose_first_page_another_process_is_writing(path):
    """SQLite waits for no one who makes the log of a new file; opening it does."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("PRAGMA user_version = 1")  # a first page, and no log yet
    other.execute("BEGIN IMMEDIATE")
    impatient = sqlite3.connect(path, timeout=30)
    with closing(impatient), pytest.raises(sqlite3.OperationalError, match="locked"):
        impatient.execute("PRAGMA journal_mode = WAL")
    end = threading.Timer(0.5, other.execute, ["ROLLBACK"])
    end.start()
    Store.open(path).close()
    end.join()
    other.close()


def test_a_file_whose_first_process_was_killed(path):
    """What it was writing lies beside the file, in a journal that only a writer may undo."""
    other = sqlite3.connect(path.with_name("other.db"), isolation_level=None)
    other.execute("PRAGMA user_version = 1")  # a first page, and no log yet
    other.execute("PRAGMA cache_size = 1")  # pages reach the file before the end of the transaction
    other.execute("BEGIN")
    other.execute("CREATE TABLE half AS SELECT randomblob(100000) AS written")
    for end in ("", "-journal"):
        shutil.copy(path.with_name(f"other.db{end}"), f"{path}{end}")
    other.close()
    with pytest.raises(StoreError, match="left half written by a process that was killed; a sweep"):
        Store.open_readonly(path)
    with Store.open(path) as store:
        write_task(store, begin_sweep(store), make_result())
        assert set(store.finished_cells([make_result().key])) == {make_result().key}
    Store.open_readonly(path).close()


def test_a_full_disk_loses_nothing_and_is_said_in_one_line(sqlite_store):
    sweep = begin_sweep(sqlite_store)
    write_task(sqlite_store, sweep, make_result("first"))

    @event.listens_for(sqlite_store.engine, "begin")
    def fill_the_disk(connection):
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    big = make_result("second", log_tail="x" * 1_000_000)
    with pytest.raises(StoreError, match=r"^results store \S+: the disk is full; free some space") as error:
        write_task(sqlite_store, sweep, big)
    assert "\n" not in str(error.value)
    event.remove(sqlite_store.engine, "begin", fill_the_disk)
    with sqlite_store.reading() as connection:
        connection.execute(text("PRAGMA max_page_count = 1000000"))
    assert set(sqlite_store.finished_cells(["first", "second"])) == {"first"}
    write_task(sqlite_store, sweep, big)
    assert set(sqlite_store.finished_cells(["first", "second"])) == {"first", "second"}
