"""How much memory a worker may use, and whether the kernel killed a process for want of it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["USABLE_SHARE", "available_bytes", "default_limit_bytes", "oom_kills"]

USABLE_SHARE = 0.9  # the rest is for the parent, the page cache and everybody else
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def default_limit_bytes(workers: int) -> int:
    """The limit of each of several workers where the user gives none."""
    return int(available_bytes() * USABLE_SHARE / workers)


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Memory that can be had now without swapping: the machine's, or less where a cgroup limits it."""
    free = [_machine_bytes(proc)]
    for folder in _own_cgroups(proc, cgroups):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
        ):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                # Pages of files that were read count as used, but the kernel gives them back.
                reclaimable = _field(folder / "memory.stat", "inactive_file") or 0
                free.append(max(0, limit - max(0, used - reclaimable)))
    return min(free)


def oom_kills(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """How often the kernel has killed a process for want of memory: here, or else on this machine."""
    for folder in _own_cgroups(proc, cgroups):
        for name in ("memory.events", "memory.oom_control"):
            kills = _field(folder / name, "oom_kill")
            if kills is not None:
                return kills
    return _field(proc / "vmstat", "oom_kill") or 0


def _machine_bytes(proc: Path) -> int:
    available = _field(proc / "meminfo", "MemAvailable:")
    if available is not None:
        return available * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _own_cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's memory cgroup and those above it, the innermost first."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroups
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container the path may be the host's, and only the root is visible.
        folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return list(dict.fromkeys(folders))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return None
