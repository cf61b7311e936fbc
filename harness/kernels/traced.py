"""Reading the graph that torch.compile hands to its backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["example_of", "operand_of"]


def example_of(node: Any) -> torch.Tensor | None:
    """The tensor that stands for a node's value while it is traced; None for anything else."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def operand_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """What a call is given for a parameter, by place or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
