"""Named models that plugins register."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ModelEntry"]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A name for `--models` and the written form of the model that it stands for."""

    name: str
    spec: str
    summary: str = ""
