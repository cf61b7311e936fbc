"""Content keys: the hash of everything that decides a value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["content_key", "file_hash", "tree_hash"]


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
