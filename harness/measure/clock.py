"""Marks in time: on the host with `perf_counter`, on the device with CUDA events."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch

__all__ = ["Clock", "DeviceClock", "HostClock", "clock_for", "paused_gc"]

HEAD_START_CYCLES = 4_000_000  # about 2 ms: longer than the host needs to launch a large graph


class Clock(Protocol):
    """Sets marks and tells the seconds between them."""

    def start(self) -> None:
        """Called before the first mark of a run, untimed."""
        ...

    def mark(self) -> Any:
        """A point in time, at the end of everything that was called before."""
        ...

    def seconds(self, marks: list[Any]) -> list[float]:
        """The time between each mark and the next, and at the end from the first to the last."""
        ...


class HostClock:
    """For the CPU, where a call has finished when it returns."""

    def start(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: list[float]) -> list[float]:
        between = [later - earlier for earlier, later in pairwise(marks)]
        return [*between, marks[-1] - marks[0]]


class DeviceClock:
    """For CUDA: events in the stream of the kernels, so that the host's own time is not measured.

    `start` gives the device something to do first, while the host queues the run: otherwise the
    first kernels would wait for the host, and the wait would be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device):
            torch.cuda._sleep(HEAD_START_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, marks: list[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize(self.device)
        pairs = [*pairwise(marks), (marks[0], marks[-1])]
        return [earlier.elapsed_time(later) / 1000 for earlier, later in pairs]


def clock_for(device: torch.device) -> Clock:
    """The clock that fits a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


@contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection inside, so that none falls into a timed call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
