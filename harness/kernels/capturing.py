"""What no CUDA graph can hold is found out before it is captured: a failed capture is hard to leave."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from harness.errors import HarnessError

__all__ = ["NotCaptured", "no_waiting"]


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
        lines = str(error).strip().splitlines()
        raise NotCaptured(f"cannot be captured: {lines[0] if lines else type(error).__name__}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
