"""Where the harness keeps what it can make again."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from harness.errors import DiskFull

__all__ = ["default_cache_dir", "raise_if_full", "replacing"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOTHING_LEFT_BYTES = 1 << 16


def default_cache_dir() -> Path:
    """`HARNESS_CACHE`, or the user's cache folder."""
    import platformdirs

    given = os.environ.get("HARNESS_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("transformer-harness"))


def raise_if_full(error: BaseException, folder: Path) -> None:
    """Raise `DiskFull` where writing into `folder` failed for want of space.

    Libraries hide the error number in a text of their own; then the disk itself is asked.
    """
    hidden: BaseException | None = error
    full = False
    while hidden is not None and not full:
        full = isinstance(hidden, OSError) and hidden.errno in _FULL
        full = full or "No space left on device" in str(hidden) or "Disk quota exceeded" in str(hidden)
        hidden = hidden.__cause__ or hidden.__context__
    with suppress(OSError):
        full = full or shutil.disk_usage(folder).free < _NOTHING_LEFT_BYTES
    if full:
        raise DiskFull(
            f"the disk of the cache {folder} is full; free some space, or set HARNESS_CACHE to another "
            "folder, and run the same command again (every finished cell is kept)"
        ) from None


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file beside this one that takes its place at the end; where that fails all is as it was.

    It may be written through its ``name`` instead. A link stays: the file that it leads to is replaced.

    Raises:
        OSError: it cannot be written, or is a pipe or a device, whose place no file may take.
    """
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is not an ordinary file")
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        with open(name, "wb") as opened:
            yield opened
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's files are for their owner only
        os.replace(name, file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
