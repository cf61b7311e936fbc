"""Where the harness keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_cache_dir"]


def default_cache_dir() -> Path:
    """`HARNESS_CACHE`, or the user's cache folder."""
    import platformdirs

    given = os.environ.get("HARNESS_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("transformer-harness"))
