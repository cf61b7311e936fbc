"""The content-keyed disk cache.

A key is the hash of everything the value depends on, so an entry is never stale; the worst that can
happen is that it is never asked for again. Entries are written beside their place and renamed into
it, so a killed process leaves no half entry. What it leaves beside them is removed a day later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness.errors import ConfigError
from harness.folders import raise_if_full, replacing
from harness.keys import content_key

__all__ = ["ContentCache"]

T = TypeVar("T")

_ABANDONED_AFTER_S = 24 * 3600.0  # without a byte: nobody writes an entry for so long


class ContentCache:
    """Tensors and plain values under the hash of what they depend on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the value of this key is, or would be."""
        digest = content_key(key)
        return self.directory / digest[:2] / f"{digest}.pt"

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], T]) -> T:
        """The stored value, or ``compute()``, stored. A damaged entry is computed again.

        Raises:
            MemoryError, RuntimeError: there is no memory for a stored value; it stays stored.
            ConfigError, DiskFull: the value cannot be stored.
        """
        path = self.path(key)
        if path.exists():
            try:
                # Mapped, not read: a large entry on its way to a GPU is not copied once more.
                stored: T = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                return stored
            except Exception as error:  # what is raised depends on which of the bytes are damaged
                if isinstance(error, MemoryError) or "Cannot allocate memory" in str(error):
                    raise  # nothing is wrong with the entry
                path.unlink(missing_ok=True)
        value = compute()
        self._write(path, value)
        return value

    def _write(self, path: Path, value: Any) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            with replacing(path) as file, _without_checksums():
                torch.save(value, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            raise_if_full(error, self.directory)
            if not isinstance(error, OSError):
                raise
            raise ConfigError(
                f"the cache {self.directory} cannot be written ({error}); "
                "set HARNESS_CACHE to a writable folder"
            ) from None

    def _remove_abandoned(self) -> None:
        """Remove what processes that were killed had written of their entries."""
        for file in self.directory.glob("??/.*.pt.*"):
            with suppress(OSError):  # another process removes it as well
                if time.time() - file.stat().st_mtime > _ABANDONED_AFTER_S:
                    file.unlink()


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Those of torch's writer take most of the time of a large entry, and its reader ignores them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
