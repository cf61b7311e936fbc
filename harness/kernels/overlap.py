"""Launches that begin before what was launched before them has ended.

Between two kernels a device idles for a microsecond or two: the last programs of one end, those of the next
begin and ask for their first data. NVIDIA's programmatic dependent launch (compute capability 9.0) lets the
next kernel begin as soon as all programs of the one before have called ``gdc_launch_dependents`` or ended;
``gdc_wait`` is where it waits until that one has ended and its writes can be read. A kernel that is launched
like this

- asks for its first weights before it waits: nothing is in the middle of writing them where `overlapping`
  says so;
- waits before it reads or writes anything else, and lets the next kernel begin after that: so when a kernel
  begins, everything has ended but what was launched right before it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["launch_options", "overlapping", "overlaps"]

_weights_rest: ContextVar[bool] = ContextVar("weights_rest", default=False)


@contextmanager
def overlapping() -> Iterator[None]:
    """Inside, no kernel writes weights, so that kernels may read theirs early. By default they do not: the
    kernel before might be what makes the weights."""
    token = _weights_rest.set(True)
    try:
        yield
    finally:
        _weights_rest.reset(token)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device can be launched like this."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """What a kernel with the parameter OVERLAP is launched with."""
    if _weights_rest.get() and overlaps(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
