"""What a forked process does before it runs a job: a session, limits, output and directories of its own."""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from harness.executors.conforming import conforming
from harness.executors.processes import die_with_parent, name_process
from harness.executors.wire import Kind, dump_message, frame

__all__ = ["Outbox", "become_worker"]

_VICTIM = "500"  # of the kernel's out-of-memory killer, before the parent and the store


class Outbox:
    """Sends messages to the keeper. Only the process that made it can: a forked child ends instead.

    The functions that it needs are taken now, so that patching them later changes nothing here.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe, self._owner, self._lock = pipe, os.getpid(), threading.Lock()
        self._getpid, self._write, self._exit = os.getpid, os.write, os._exit
        self._conforming, self._dump, self._frame = conforming, dump_message, frame

    def __call__(self, message: Any) -> None:
        """Send a message.

        Raises:
            ValueError: it holds values of the wrong type.
            OSError: the pipe is closed.
        """
        if self._getpid() != self._owner:
            self._exit(1)
        data = memoryview(self._frame(Kind.MESSAGE, self._dump(self._conforming(message))))
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # a method may have closed or replaced them
                stream.flush()
        with self._lock:
            while data:
                data = data[self._write(self._pipe, data) :]


def become_worker(
    setup: dict[str, Any], job: bytes, message_w: int, log_w: int, private: Sequence[int], scratch: str
) -> NoReturn:
    """Run the job in this freshly forked process, which ends here."""
    code = 1
    try:
        keeper = os.getppid()
        die_with_parent()
        if os.getppid() != keeper or keeper == 1:
            return_to_nobody()
        os.setsid()
        name_process("harness-worker")
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        for descriptor in private:
            os.close(descriptor)
        _redirect(log_w)
        os.environ.clear()
        os.environ.update(setup["environment"])
        os.environ["TMPDIR"] = scratch
        tempfile.tempdir = None
        sys.path[:] = setup["sys_path"]
        sys.argv[:] = setup["argv"]
        try:
            os.chdir(setup["directory"])
        except OSError:
            os.chdir(scratch)
        _limit(setup["memory_limit_bytes"] if setup["limit_address_space"] else None)
        module, _, name = setup["target"].partition(":")
        run: Callable[[Any, Outbox], int] = getattr(importlib.import_module(module), name)
        code = run(pickle.loads(job), Outbox(message_w))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # Not sys.exit: nothing that a method left behind (exit handlers, threads) may hold this up.
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def return_to_nobody() -> NoReturn:
    """The keeper ended before this process could ask to end with it."""
    os._exit(1)


def _redirect(log_w: int) -> None:
    """Send everything that is printed, also by libraries in C and by children, to the keeper."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for descriptor in (1, 2):
        os.dup2(log_w, descriptor)
    os.close(log_w)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.stderr)  # a segmentation fault says where


def _limit(memory_bytes: int | None) -> None:
    """Let a runaway allocation fail in this process, and leave no core file.

    `memory_bytes` counts from now: what the preloaded imports have reserved is no method's doing.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_VICTIM)
    if memory_bytes is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = memory_bytes + _data_bytes()
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _data_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:
        return 0
    return pages * resource.getpagesize()
