"""Whether the process that runs a sweep still lives, so that a killed sweep is not called running.

A process is known by the boot of its machine, its namespace, its number and the moment it started; where
one of these cannot be told (another machine, another container, no Linux) it counts as alive.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["has_ended", "this_process"]


def this_process() -> dict[str, Any] | None:
    """What this process is known by, as JSON values; None where there is no `/proc`."""
    place, started = _place(), _started(os.getpid())
    return None if place is None or started is None else {**place, "pid": os.getpid(), "started": started}


def has_ended(process: Mapping[str, Any] | None) -> bool:
    """True where it is certain that a process has ended."""
    here = _place()
    if not process or here is None:
        return False
    if process.get("boot") != here["boot"]:
        # Another boot of this very machine has ended all its processes; another machine's may live.
        return process.get("machine") is not None and process.get("machine") == here["machine"]
    if process.get("namespace") != here["namespace"]:
        return False
    return _started(int(process["pid"])) != process.get("started")


def _place() -> dict[str, Any] | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {
            "boot": boot,
            "machine": _machine(),
            "namespace": Path("/proc/self/ns/pid").stat().st_ino,
        }
    except OSError:
        return None


def _machine() -> str | None:
    """What the machine keeps over boots, hashed, as its number is private; None where it has none."""
    try:
        number = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return None
    return hashlib.sha256(f"transformer-harness {number}".encode()).hexdigest()[:16] if number else None


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where it has ended."""
    try:
        fields = Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])
