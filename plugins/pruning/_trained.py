"""Which models can be trained while they are pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import ModelInfo

__all__ = ["training_refusal"]


def training_refusal(info: ModelInfo, *, trains: bool = True) -> str | None:
    """Why a pruner, one that trains or not, does not fit a model."""
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if trains and info.kind == "encoder":
        return "encoders have no training objective here"
    return None
