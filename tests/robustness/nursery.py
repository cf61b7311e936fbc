"""A process with everything imported, from which whole sweeps and their fork servers are forked.

So a sweep as a process of its own, with a fork server of its own, costs milliseconds instead of ten seconds
of imports, and can be killed thirty times in a test. It adopts orphans: whatever a sweep leaves behind
becomes its descendant, and is found.

Run as ``python -m tests.robustness.nursery SOCKET``; `Nursery` starts and speaks to it.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness.executors.processes import adopt_orphans, descendants

ROOT = Path(__file__).parents[2]


# --- the tests' side ----------------------------------------------------------------------------------


class Nursery:
    """Starts the process, and sweeps in it."""

    def __init__(self, folder):
        self.path = str(folder / "nursery")
        self._swept = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.robustness.nursery", self.path],
            cwd=ROOT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not os.path.exists(self.path):
            assert self.process.poll() is None, "the nursery ended"
            assert time.monotonic() < deadline, "the nursery does not start"
            time.sleep(0.05)

    def sweep(self, folder, *arguments, kill_at=None, closed=(), terminal=None, patches=None, **environment):
        """``harness ARGUMENTS`` as a process of its own, in `folder`.

        Args:
            kill_at: ``(moment, number, signal)``: it sends that to itself (by default SIGKILL) at that
                statement or commit of its store.
            closed: of 1 and 2 those whose reader is gone.
            terminal: the path of one that both are.
            patches: ``{"module:name": value}``, set before it begins.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        request = {
            "folder": str(folder),
            "arguments": [str(argument) for argument in arguments],
            "environment": {"HARNESS_CACHE": str(folder / "cache")} | environment,
            "kill_at": kill_at,
            "closed": closed,
            "terminal": terminal,
            "patches": patches or {},
            "nursery": self.path,
        }
        for name in ("err", "out"):
            (folder / name).write_text("")
        connection.sendall(json.dumps(request).encode() + b"\n")
        stream = connection.makefile("r")
        self._swept.append(Swept(folder, int(stream.readline()), connection, stream))
        return self._swept[-1]

    def hang_up(self):
        """Forget the sweeps: a test that failed has not waited for the end of its own, and kills it."""
        for swept in self._swept:
            swept.abandon()
        self._swept.clear()

    def strays(self):
        """Everything that lives below the nursery."""
        return descendants(self.process.pid)

    def wait_until_empty(self, seconds=15):
        deadline = time.monotonic() + seconds
        while (left := self.strays()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, [Path(f"/proc/{pid}/stat").read_text() for pid in left]

    def close(self):
        self.process.kill()
        self.process.wait()


@dataclass
class Swept:
    """A sweep that was started."""

    folder: Path
    pid: int
    connection: socket.socket
    stream: object
    code: int | None = field(default=None, init=False)

    @property
    def err(self):
        return (self.folder / "err").read_text(errors="replace")

    @property
    def out(self):
        return (self.folder / "out").read_text(errors="replace")

    def wait(self, timeout=90):
        """Its exit code; negative for a signal."""
        if self.code is None:
            self.connection.settimeout(timeout)
            try:
                self.code = int(self.stream.readline())
            except TimeoutError:
                raise AssertionError(f"the sweep does not end:\n{self.err}") from None
            self.stream.close()
            self.connection.close()
        return self.code

    def abandon(self):
        """Kill it unless it has ended, and close what leads to it."""
        if self.code is None and not select.select([self.connection], [], [], 0)[0]:
            self.kill()  # its end would have been told, and its number would be another's
        self.stream.close()
        self.connection.close()

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait_for(self, text, timeout=60):
        """Until it has said this on standard error."""
        self._wait_until(lambda: text in self.err, timeout)

    def wait_for_note(self, word, timeout=60):
        """Until a method of this sweep has noted this."""
        self._wait_until(lambda: word in self.notes(), timeout)

    def notes(self):
        """The words that its methods noted, in order."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "processes").read_text().split()
        return []

    def _wait_until(self, happened, timeout):
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, self.err
            time.sleep(0.005)

    def server_pid(self):
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "server.pid").read_text())
        return None

    def processes(self, name):
        """The ids of this sweep's living processes of that name (``harness-worker``)."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _name(entry) == name and _parent_folder(entry, name) == str(self.folder):
                found.append(int(entry))
        return found


def _name(pid):
    try:
        return Path("/proc", str(pid), "comm").read_text().strip()
    except OSError:
        return None


def _parent_folder(pid, name):
    """A worker stands in the sweep's folder, its keeper in the nursery's."""
    try:
        if name == "harness-keeper":
            [pid] = [each for each in descendants(int(pid)) if _name(each) == "harness-worker"]
        return os.readlink(f"/proc/{pid}/cwd")
    except (OSError, ValueError):
        return None


# --- the process --------------------------------------------------------------------------------------


def main(path):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a sweep would ignore it too
    import harness.cli.app
    import harness.cli.results
    import harness.comparing
    import harness.corpus
    import harness.executors.calling
    import harness.executors.preload
    import harness.measure.bundled
    import harness.measure.ceilings
    import harness.measure.control
    import harness.measure.profile
    import harness.measure.timing
    import harness.planning
    import harness.progress
    import harness.store.queries
    import harness.store.store
    import harness.sweep
    from harness.plugins import load_plugins
    from harness.store import migrations

    del migrations
    # What is tested is not how long things take: few readings, few meters.
    harness.measure.timing.CPU_BUDGET = harness.measure.timing.TimingBudget(1, 1, 0.0)
    harness.measure.control._PRODUCTS = 1
    harness.measure.profile.HOST_PROFILES = 1
    harness.planning.threads_per_worker = lambda jobs: 1
    harness.measure.ceilings.measure_ceilings = _no_ceilings
    harness.measure.bundled.register_meters = _few_meters(harness.measure.bundled.register_meters)
    load_plugins(())
    harness.corpus.kjv_books()  # every sweep hashes the text that it may calibrate on
    adopt_orphans()
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)
    waiting = {}
    listener.settimeout(0.02)
    while os.getppid() != 1:
        _tell_ends(waiting)
        try:
            connection = listener.accept()[0]
        except TimeoutError:
            continue
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 1)
        if not data:  # killed before it could say what it wants
            connection.close()
            continue
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            try:
                listener.close()
                connection.close()
                for other in waiting.values():
                    other.close()
                if descriptors:
                    _serve(descriptors[0])
                _sweep(request)
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # whoever asked for a server may have been killed since
            connection.sendall(f"{pid}\n".encode())
        waiting[pid] = connection


def _no_ceilings(device, threads):
    from harness.measure.ceilings import Ceilings

    return Ceilings(device, threads)


_no_ceilings.__module__, _no_ceilings.__qualname__ = "harness.measure.ceilings", "measure_ceilings"


def _few_meters(register):
    from harness import hookimpl

    few = ("prefill_latency", "decode_latency", "kv_cache_bytes_per_token")
    return hookimpl(lambda: [meter for meter in register() if meter.name in few])


def _tell_ends(waiting):
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        connection = waiting.pop(pid, None)
        if connection is not None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _serve(descriptor):
    from harness.executors.serving import serve

    os.setsid()
    serve(socket.socket(fileno=descriptor))
    os._exit(0)


def _sweep(request):
    from harness.cli.app import run
    from harness.executors import server

    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for number, name in ((1, "out"), (2, "err")):
        if number in request["closed"]:
            unread, file = os.pipe()
            os.close(unread)
        else:
            file = os.open(request["terminal"] or name, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["harness", *request["arguments"]]
    server.shared_server()._launcher = lambda: _launch(request["nursery"], server.Launched)
    for place, value in request["patches"].items():
        module, name = place.split(":")
        if value == "backwards":
            value = _BackwardsDatetime
        setattr(importlib.import_module(module), name, value)
    if request["kill_at"]:
        _kill_at(*request["kill_at"])
    code = run(request["arguments"])
    sys.stdout.flush()
    os._exit(code)


def _launch(path, launched):
    """A fork server from the nursery, which has everything imported and runs no thread."""
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as connection, theirs:
        connection.connect(path)
        socket.send_fds(connection, [b"{}"], [theirs.fileno()])
        pid = int(connection.recv(20))
    Path("server.pid.new").write_text(str(pid))
    os.rename("server.pid.new", "server.pid")
    return launched(ours, None, tempfile.TemporaryFile())


class _BackwardsDatetime(datetime.datetime):
    """Every time that it is asked, it is a minute earlier."""

    asked = 0

    @classmethod
    def now(cls, zone=None):
        cls.asked += 1
        return datetime.datetime(2020, 1, 1, tzinfo=zone) - datetime.timedelta(minutes=cls.asked)


def _kill_at(moment, number, what=signal.SIGKILL):
    """Die at the n-th statement that starts like this, or before or after the n-th commit."""
    from sqlalchemy import Engine, event

    left = number

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), what)

    if moment == "before commit":
        event.listen(Engine, "commit", count)
    elif moment == "after commit":
        # The next transaction begins only when the last one has been committed.
        event.listen(Engine, "begin", count)
    else:
        event.listen(
            Engine,
            "after_cursor_execute",
            lambda connection, cursor, statement, *_: statement.startswith(moment) and count(),
        )


if __name__ == "__main__":
    main(sys.argv[1])
