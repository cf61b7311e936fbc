"""What configurations said of models, kept under their content.

To read a configuration transformers imports the classes of its models, which takes seconds before a sweep
knows what it is to do. What was read once is read from here.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.folders import default_cache_dir, replacing
from harness.keys import content_key
from harness.models import info as reader
from harness.models.info import ModelInfo

__all__ = ["known_info", "remember_info"]

_OF_THE_CALL: dict[str, Any] = {"label": "", "synthetic": False, "scratch": False, "modifiers": ()}


def known_info(directory: Path, label: str, modifiers: tuple[str, ...]) -> ModelInfo | None:
    """What the configuration in this folder says, if it was read before by the same versions."""
    try:
        found = json.loads(_place(directory).read_text(encoding="utf-8"))
        info = ModelInfo(**found, **_OF_THE_CALL)
    except (OSError, ValueError, TypeError):
        return None
    return replace(info, label=label, modifiers=modifiers)


def remember_info(directory: Path, info: ModelInfo) -> None:
    """Keep it. Where that cannot be, the configuration is read again the next time."""
    if known_info(directory, info.label, info.modifiers) is not None:
        return
    kept = {name: value for name, value in asdict(info).items() if name not in _OF_THE_CALL}
    with suppress(OSError):
        place = _place(directory)
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            file.write(json.dumps(kept).encode())


def _place(directory: Path) -> Path:
    """The file for this configuration, these versions and these facts."""
    key = content_key(
        {
            "config": (directory / "config.json").read_text(encoding="utf-8"),
            "transformers": version("transformers"),
            "reader": Path(reader.__file__).read_text(encoding="utf-8"),
            "facts": [each.name for each in fields(ModelInfo)],
        }
    )
    return default_cache_dir() / "models" / f"{key}.json"
