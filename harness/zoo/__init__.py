"""The small checkpoints that come with the project, and the recipe that made them.

`python -m harness.zoo.recipe --help` trains another. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path

from harness.errors import UnknownName

__all__ = ["checkpoint_directory", "checkpoint_names"]

_CHECKPOINTS = Path(__file__).parent / "checkpoints"


def checkpoint_names() -> list[str]:
    """Names of the bundled checkpoints, sorted."""
    return sorted(file.parent.name for file in _CHECKPOINTS.glob("*/config.json"))


def checkpoint_directory(name: str) -> Path:
    """Directory of a bundled checkpoint, in Hugging Face format."""
    names = checkpoint_names()
    if name not in names:
        raise UnknownName("zoo model", name, names)
    return _CHECKPOINTS / name
