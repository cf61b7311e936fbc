"""Where tasks come from: folders of lm-eval task files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TaskSource"]


@dataclass(frozen=True, slots=True)
class TaskSource:
    """A folder of lm-eval YAML files that a plugin brings, as `--include-path` does for a user."""

    path: Path
    summary: str = ""
