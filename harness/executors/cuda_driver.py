"""Whether this process has touched CUDA, asked without touching it: children forked after that cannot use it.

An import is enough. Some packages ask for devices while they are imported, and every worker that is forked
afterwards ends at its first allocation ("Cannot re-initialize CUDA in forked subprocess").
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

__all__ = ["QUIET_CHECKS", "is_started"]

QUIET_CHECKS = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Environment in which `torch.cuda.is_available` asks the management library and leaves the driver alone."""

_LIBRARY = "libcuda.so.1"
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


def _loaded() -> ctypes.CDLL:
    """The driver's library where this process has loaded it; else OSError."""
    return ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD)


def is_started(loaded: Callable[[], ctypes.CDLL] = _loaded) -> bool:
    """Whether the driver was started in this process (`cuInit`).

    Every call but a few answers "not initialized" until then, and starts nothing.
    """
    try:
        library = loaded()
    except OSError:
        return False
    count = ctypes.c_int()
    return bool(library.cuDeviceGetCount(ctypes.byref(count)) != _NOT_INITIALIZED)
