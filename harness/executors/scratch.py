"""A worker's folder for temporary files: its keeper removes it, or the fork server where that was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["make_scratch", "remove_scratch", "remove_scratch_of"]


def make_scratch() -> str:
    """A new folder, named after the fork server and this process, which is a keeper."""
    return tempfile.mkdtemp(prefix=_prefix(os.getppid(), os.getpid()))


def remove_scratch(folder: str | Path) -> None:
    """Remove such a folder with all that is in it; what cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_scratch_of(keeper: int) -> None:
    """Remove what a keeper of this process, the fork server, has left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(os.getpid(), keeper)}*"):
        remove_scratch(folder)


def _prefix(server: int, keeper: int) -> str:
    return f"harness-worker-{server}-{keeper}-"
