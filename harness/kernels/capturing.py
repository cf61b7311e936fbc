"""CUDA graphs of kernels: what none can hold, found out before a capture fails, and the time of a replay."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from harness.errors import HarnessError, first_line

__all__ = ["NotCaptured", "no_waiting", "replay_us"]


class NotCaptured(HarnessError):
    """A call does what no CUDA graph can hold."""


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the device raises.

    Raises:
        NotCaptured: something did, or failed otherwise.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode is new
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except Exception as error:
        raise NotCaptured(f"cannot be captured: {first_line(error)}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def replay_us(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Microseconds on the device of each of the `calls` that a graph holds, in one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms * 1000 / calls
