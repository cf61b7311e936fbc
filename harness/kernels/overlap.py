"""Launches that begin before what was launched before them has ended.

Between two kernels a device idles for a microsecond or two: the last programs of one end, those of the next
begin and ask for their first data. NVIDIA's programmatic dependent launch (compute capability 9.0) lets the
next kernel begin as soon as all programs of the one before have called ``gdc_launch_dependents`` or ended;
``gdc_wait`` is where it waits until that one has ended and its writes can be read. A kernel that is launched
like this

- asks for weights to be fetched into the second-level cache before it waits, which reads no value, so that
  whatever the kernels before still write is safe;
- waits before it reads or writes anything, and lets the next kernel begin after that: so when a kernel
  begins, everything has ended but what was launched right before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["launch_options", "overlaps"]


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device are launched like this; False where it is no CUDA device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """What a kernel with the parameter OVERLAP is launched with."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
