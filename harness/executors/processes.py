"""What the kernel offers to keep hold of processes, and what `/proc` says about them.

Linux only: elsewhere every function here does nothing, or finds nothing, and process groups remain.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = [
    "adopt_orphans",
    "descendants",
    "die_with_parent",
    "fair_bytes",
    "kill_children",
    "name_process",
    "private_bytes",
    "reap",
]

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_END_LIMIT_S = 10.0  # a process in an uninterruptible system call cannot be killed at all


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, daemons included."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show (15 characters)."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(buffer))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def descendants(root: int, *, sparing: Container[int] = ()) -> list[int]:
    """All living processes below `root` at one look, children before grandchildren.

    Args:
        sparing: processes that are left out, with all that is below them.
    """
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    frontier = [root]
    while frontier:
        frontier = [child for pid in frontier for child in children.get(pid, ()) if child not in sparing]
        found += frontier
    return found


def _parents() -> Iterator[tuple[int, int]]:
    try:
        entries = os.listdir("/proc")
    except OSError:
        return
    for entry in entries:
        if entry.isdigit():
            with suppress(OSError):  # it ended meanwhile
                fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
                if fields[0] != b"Z":
                    yield int(entry), int(fields[1])


def reap() -> dict[int, int]:
    """Collect children that have ended, without waiting: exit code by process id."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def kill_children() -> dict[int, int]:
    """Kill all descendants of this process, which must have adopted orphans, and wait for their end.

    Returns:
        the exit codes of those that became its own children, by process id.
    """
    ended: dict[int, int] = {}
    deadline = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < deadline:
        ended |= reap()
        if not _has_children():
            break
        for pid in descendants(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return ended


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


# --- memory -------------------------------------------------------------------------------------------


def private_bytes(pid: int) -> int:
    """What a process has in memory or swap that no file backs; pages shared by a fork count in full."""
    return _sum_kb(Path("/proc", str(pid), "status"), (b"RssAnon:", b"RssShmem:", b"VmSwap:"))


def fair_bytes(pid: int) -> int:
    """The same with shared pages divided among those who share them; slow for large processes."""
    return _sum_kb(Path("/proc", str(pid), "smaps_rollup"), (b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:"))


def _sum_kb(path: Path, names: tuple[bytes, ...]) -> int:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:  # it ended meanwhile, or this is no Linux
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(names))
