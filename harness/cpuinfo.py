"""What Linux says of the processor."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cpu_fact"]


def cpu_fact(*names: str) -> str | None:
    """The first entry of one of these names in ``/proc/cpuinfo`` that says something; None without one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names and value.strip():
            return value.strip()
    return None
