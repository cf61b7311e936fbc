"""Content keys: the hash of everything that decides a value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["content_key", "file_hash", "file_stamps", "tree_hash"]


def content_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `parts`; only JSON values are accepted.

    >>> content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_hash(directory: Path, names: list[str]) -> str:
    """One hash over the named files of a folder: their names and contents, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0" + file_hash(directory / name).encode())
    return digest.hexdigest()


def file_stamps(directory: Path, names: list[str]) -> tuple[tuple[str, int, int, int], ...]:
    """Of the named files of a folder: name, bytes, number and the time of their last change of any kind.

    Where these are as they were, so are the contents; where they are not, only the contents tell.
    """
    found = []
    for name in sorted(names):
        about = (directory / name).stat()
        found.append((name, about.st_size, about.st_ino, about.st_ctime_ns))
    return tuple(found)
